"""From finished stages to the table and the report; and the whole command once, small."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from torchlethe.cli import main
from torchlethe.study import load_study, plan_jobs
from torchlethe.study.figures import Bar, bars, histogram
from torchlethe.study.report import duration, finding, method_marks, render
from torchlethe.study.results import collect, markdown, number, signed, table_csv
from torchlethe.study.runner import Outcome

STUDY = {
    "name": "Ends & <means>",
    "seeds": [0, 1],
    "reference": "retrain",
    "original": "judged",
    "scenarios": {"one": {"title": "One class"}, "ten": {"title": "10 %"}},
    "stages": {
        "sfron": {"method": "SFRon"},
        "tune": {"method": "FineTune"},
        "retrain": {"method": "Retrain"},
        "judged": {"method": "Original", "command": "test"},
    },
}
# forget, remain, test accuracy, attack, KL, seconds
NUMBERS = {
    "sfron": (82.0, 99.0, 90.0, 68.0, 0.3, 2.0),
    "tune": (98.0, 100.0, 92.0, 74.0, 0.6, 5.0),
    "retrain": (80.0, 100.0, 91.0, 66.0, None, 10.0),
    "judged": (100.0, 100.0, 93.0, 78.0, 0.9, None),
}
KEYS = ("forget_accuracy", "remain_accuracy", "test_accuracy", "mia_entropy_logistic", "kl_to_reference", "run_seconds")


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return load_study(path)


@pytest.fixture
def outcomes(study, tmp_path):
    found = []
    rng = np.random.default_rng(0)
    for job in plan_jobs(study, tmp_path / "out"):
        job.folder.mkdir(parents=True)
        metrics = {
            key: value + job.seed for key, value in zip(KEYS, NUMBERS[job.stage.name], strict=True) if value is not None
        }
        metrics |= {"original_forget_accuracy": 1.0, "mia_simple": None, "meta": {"split_hash": "x"}}
        (job.folder / "evaluation.json").write_text(json.dumps(metrics))
        np.savez(job.folder / "evaluation.npz", confidence_forget=rng.random(50, dtype=np.float32))
        (job.folder / "config.yaml").write_text("model: <b>\n")
        found.append(Outcome(job, "done", 3.0))
    return found


def test_rows_have_one_order(study, outcomes):
    results = collect(study, outcomes)
    assert results.methods == ["Original", "Retrain", "SFRon", "FineTune"]
    assert method_marks(results) == {"Original": 0, "Retrain": 1, "SFRon": 2, "FineTune": 3}


def test_cells_hold_mean_spread_and_gap(study, outcomes):
    results = collect(study, outcomes)
    cell = results.cell("one", "SFRon", "forget_accuracy")
    assert cell.mean == 82.5
    assert cell.std == pytest.approx(0.5**0.5)
    assert cell.gap == 2.0
    assert results.cell("one", "Retrain", "forget_accuracy").gap is None
    assert results.cell("one", "SFRon", "average_gap").mean == pytest.approx((2 + 1 + 1 + 2) / 4)
    assert results.cell("one", "SFRon", "speed_up").mean == pytest.approx((10 / 2 + 11 / 3) / 2)
    assert results.cell("one", "Original", "run_seconds") is None
    assert results.cell("one", "SFRon", "original_forget_accuracy") is None
    assert results.cell("one", "SFRon", "mia_simple") is None


def test_the_best_is_closest_to_the_reference(study, outcomes):
    results = collect(study, outcomes)
    best = {name: results.best("one", name) for name in results.columns("one")}
    assert best["forget_accuracy"] == best["kl_to_reference"] == best["run_seconds"] == "SFRon"
    assert best["remain_accuracy"] == "FineTune"
    assert best["test_accuracy"] is None  # a tie


def test_a_missing_run_leaves_the_others(study, outcomes):
    lost = [
        Outcome(outcome.job, "failed", 1.0, "it broke.") if outcome.job.stage.name == "tune" else outcome
        for outcome in outcomes
    ]
    results = collect(study, lost)
    assert results.methods == ["Original", "Retrain", "SFRon"]
    html = render(results, {}, "lethe study x")
    assert "4 of 16 runs are missing" in html
    assert "it broke." in html


def test_a_study_without_results_still_has_a_report(study, outcomes):
    results = collect(study, [Outcome(outcome.job, "failed", 0.0, "no") for outcome in outcomes])
    assert "16 of 16 runs are missing" in render(results, {}, "lethe study x")
    assert markdown(results).startswith("# Ends")


def test_markdown_and_csv_agree(study, outcomes):
    results = collect(study, outcomes)
    text = markdown(results)
    assert "## One class" in text
    assert "| SFRon | **82.5 ± 0.7 (+2.0)** | 99.5 ± 0.7 (−1.0) |" in text
    assert "over 2 seeds" in text
    lines = list(csv.DictReader(io.StringIO(table_csv(results))))
    line = next(
        line for line in lines if (line["scenario"], line["method"], line["metric"]) == ("one", "SFRon", KEYS[0])
    )
    assert (line["mean"], line["gap_to_reference"], line["seed_0"], line["runs"]) == ("82.5", "2.0", "82.0", "2")


def test_report_is_self_contained_and_escaped(study, outcomes):
    results = collect(study, outcomes)
    html = render(results, {"torch": "2"}, "lethe study a&b.yaml")
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", html)
    assert set(re.findall(r"https?://[\w./]+", html)) <= {"http://www.w3.org/1999/xlink"}
    assert "Ends &amp; &lt;means&gt;" in html
    assert "model: &lt;b&gt;" in html
    assert "lethe study a&amp;b.yaml" in html
    assert html.count("<svg") == 2 * (6 + 2)
    assert "var(--m2)" in html
    assert not re.search(r"#0[1-5]0[0-9a-f]{3}\b", html)  # every colour mark was replaced
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert html.count("<table>") == 2
    assert len(identifiers) > 0


def test_finding_says_what_the_numbers_say(study, outcomes):
    results = collect(study, outcomes)
    sentence = finding(results, results.scenarios[0])
    assert sentence == (
        "SFRon comes closest to Retrain: 1.5 points apart on average (Original: 8.5), and 4.3 times faster."
    )


def test_numbers_as_people_write_them():
    assert number(-0.04, "forget_accuracy") == "0.0"
    assert signed(-1.25, "test_accuracy") == "−1.2"
    assert signed(0.5, "kl_to_reference") == "+0.500"
    assert number(123.4, "run_seconds") == "123"
    assert [duration(seconds) for seconds in (4, 65, 7300)] == ["4 s", "1 min", "2 h 2 min"]


def test_figures_take_colours_and_fonts_from_the_page():
    rows = [Bar("A & B", 50.0, 2.0, "50.0 ± 2.0", 2), Bar("C", 0.0, None, "0.0", 3)]
    for svg in (
        bars(rows, 'a "title"', 100, rows[0]),
        bars([], "nothing"),
        histogram(np.array([0.1, 0.9]), np.empty(0), np.array([0.5]), 2, "h"),
        histogram(np.empty(0), np.empty(0), np.empty(0), 2, "empty"),
    ):
        assert svg.startswith("<svg viewBox=")
        assert "font-family" not in svg
        assert "width=" not in svg.split(">", 1)[0]


def test_the_command_from_file_to_report(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    from torchlethe._cli.catalog import configs_folder

    source = configs_folder() / "digits"
    content = yaml.safe_load((source / "study.yaml").read_text())
    content["seeds"] = [3]
    del content["scenarios"]["ten_percent"]
    for stage, settings in content["stages"].items():
        short = {"model.init_args.steps": 4} if stage == "sfron" else {"trainer.max_epochs": 1}
        settings["set"] |= short if settings.get("command") != "test" else {}
    for path in source.glob("*.yaml"):
        Path(path.name).write_text(path.read_text())
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    assert main(["study", "study.yaml", "--dry-run"]) == 0
    assert "5 of 5 stages would run" in capfd.readouterr().err
    assert not Path("runs").exists()
    assert main(["study", "study.yaml", "--output", "out"]) == 0
    assert "5 stages run, 0 kept, 0 failed" in capfd.readouterr().err
    table = Path("out/table.md").read_text()
    for method in ("Original", "Retrain", "FineTune", "SFRon"):
        assert f"| {method} |" in table
    html = Path("out/report.html").read_text()
    assert "lethe study study.yaml --output out" in html
    assert str(tmp_path) not in html  # nothing of the machine
    assert main(["study", "study.yaml", "--output", "out", "--dry_run"]) == 0
    assert "0 of 5 stages would run" in capfd.readouterr().err
    assert main(["study", "study.yaml", "--output", "out", "--force", "sfron"]) == 0
    assert "1 stages run, 4 kept" in capfd.readouterr().err
    assert Path("out/table.csv").read_text().count("\n") > 20
