"""From finished stages to the table, the figures and the report; and the whole command once, small."""

import csv
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image

from torchlethe.cli import main
from torchlethe.study import load_study, plan_jobs
from torchlethe.study.collect import collect
from torchlethe.study.curves import Line, curve_plot
from torchlethe.study.figures import PRINT, Bar, bar_plot, histogram, inline
from torchlethe.study.output import write_results
from torchlethe.study.panels import curve_panels, method_marks, write_figures
from torchlethe.study.pareto import Axis, Point, front, pareto_plot
from torchlethe.study.report import duration, finding, render, without_places
from torchlethe.study.runner import Outcome
from torchlethe.study.tables import caption, latex, markdown, number, signed, table_csv

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


def make(folder, content=STUDY, measure=None):
    """A checked study and the outcomes of its jobs, which have measured what ``measure(job)`` says."""
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = load_study(path)
    found = []
    rng = np.random.default_rng(0)
    for job in plan_jobs(study, folder / "out"):
        job.folder.mkdir(parents=True)
        (job.folder / "evaluation.json").write_text(json.dumps(measure(job) if measure else unlearned(job)))
        if measure is None:
            np.savez(job.folder / "evaluation.npz", confidence_forget=rng.random(50, dtype=np.float32))
        (job.folder / "config.yaml").write_text("model: <b>\n")
        found.append(Outcome(job, "done", 3.0))
    return study, found


def unlearned(job):
    numbers = zip(KEYS, NUMBERS[job.stage.name], strict=True)
    metrics = {key: value + job.seed for key, value in numbers if value is not None}
    return metrics | {"original_forget_accuracy": 1.0, "mia_simple": None, "meta": {"split_hash": "x"}}


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


@pytest.fixture
def results(made):
    return collect(*made)


def test_rows_have_one_order(results):
    assert results.methods == ["Original", "Retrain", "SFRon", "FineTune"]
    assert method_marks(results) == {"Original": 0, "Retrain": 1, "SFRon": 2, "FineTune": 3}


def test_cells_hold_mean_spread_and_gap(results):
    cell = results.cell("one", "SFRon", "forget_accuracy")
    assert cell.mean == 82.5
    assert cell.std == pytest.approx(0.5**0.5)
    assert cell.gap == 2.0
    assert cell.gap_in_spreads == pytest.approx(2 / 0.5**0.5)
    assert results.cell("one", "Retrain", "forget_accuracy").gap is None
    assert results.cell("one", "SFRon", "average_gap").mean == pytest.approx((2 + 1 + 1 + 2) / 4)
    assert results.cell("one", "SFRon", "speed_up").mean == pytest.approx((10 / 2 + 11 / 3) / 2)
    assert results.cell("one", "Original", "run_seconds") is None
    assert results.cell("one", "SFRon", "original_forget_accuracy") is None
    assert results.cell("one", "SFRon", "mia_simple") is None


@pytest.mark.parametrize(
    ("seeds", "step", "sentence"),
    [
        ([0, 1], 0, "as Retrain has the same value for all seeds"),
        ([0], 1, "one seed gives no spread of Retrain"),
        ([0, 1], 1, "its size in standard deviations σ of Retrain over its seeds;"),
    ],
)
def test_a_gap_without_spread_to_compare_with_says_so(tmp_path, seeds, step, sentence):
    def measure(job):
        return {"forget_accuracy": NUMBERS[job.stage.name][0] + step * job.seed}

    results = collect(*make(tmp_path / "x", STUDY | {"seeds": seeds}, measure))
    assert sentence in caption(results)
    assert ("σ" in markdown(results)) == ("σ" in sentence)
    assert results.cell("one", "SFRon", "forget_accuracy").gap == 2.0


def test_the_best_is_closest_to_the_reference(results):
    best = {name: results.best("one", name) for name in results.columns("one")}
    assert best["forget_accuracy"] == best["kl_to_reference"] == best["run_seconds"] == "SFRon"
    assert best["remain_accuracy"] == "FineTune"
    assert best["test_accuracy"] is None  # a tie


def test_a_failure_keeps_the_others_and_shows_its_traceback(made):
    study, outcomes = made
    lost = []
    for outcome in outcomes:
        if outcome.job.stage.name == "tune":
            (outcome.job.folder / "error.txt").write_text("Traceback\nValueError: alpha < 0\n")
            outcome = Outcome(outcome.job, "failed", 1.0, "alpha is below 0.")
        elif outcome.job.folder.match("sfron/one/seed-1"):
            outcome = Outcome(outcome.job, "blocked", 0.0, "needs tune")
        lost.append(outcome)
    results = collect(study, lost)
    assert results.methods == ["Original", "Retrain", "SFRon"]
    html = render(results, {}, "lethe study x")
    assert "5 of 16 runs are missing" in html
    assert re.search(
        r"<details><summary><strong>tune.*?alpha is below 0.</summary><pre[^>]*>Traceback\nValueError", html
    )
    assert "ValueError: alpha &lt; 0" in html
    assert html.count('no result: <a href="#failures">') == 2  # one row in each scenario
    assert html.count("1 of 2 seeds") == 1


def test_a_study_without_results_still_has_a_report(made, tmp_path):
    study, outcomes = made
    failed = [Outcome(outcome.job, "failed", 0.0, "no") for outcome in outcomes]
    report = write_results(study, failed, tmp_path / "out", ["study.yaml"])
    assert "16 of 16 runs are missing" in report.read_text()
    assert report.with_name("table.md").read_text().startswith("# Ends")
    assert not (tmp_path / "out" / "figures").exists()


def test_a_traceback_does_not_name_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f'File "{tmp_path}/configs/a.py"\nFile "/opt/x/lib/python3.11/site-packages/torch/nn.py"'
    assert without_places(text) == 'File "./configs/a.py"\nFile "…/site-packages/torch/nn.py"'


def test_markdown_and_csv_agree(results):
    text = markdown(results)
    assert "## One class" in text
    assert "| SFRon | **82.5 ± 0.7 (+2.0, 2.8 σ)** | 99.5 ± 0.7 (−1.0, 1.4 σ) |" in text
    assert "over 2 seeds" in text
    lines = csv.DictReader(io.StringIO(table_csv(results)))
    line = next(x for x in lines if (x["scenario"], x["method"], x["metric"]) == ("one", "SFRon", KEYS[0]))
    assert (line["mean"], line["gap_to_reference"], line["seed_0"], line["runs"]) == ("82.5", "2.0", "82.0", "2")
    assert float(line["gap_in_reference_std"]) == pytest.approx(2 / float(line["reference_std"]))


def test_the_only_scenario_has_a_heading_where_it_has_a_title(tmp_path):
    for scenario, titled in (({"title": "One class"}, True), ({}, False)):
        study, outcomes = make(tmp_path / str(titled), STUDY | {"scenarios": {"one_class": scenario}})
        results = collect(study, outcomes)
        assert ("## One class" in markdown(results)) == titled
        assert (": One class." in latex(results)) == titled
        assert f"<h2>{'One class' if titled else 'Results'}</h2>" in render(results, {}, "x")


def test_latex_has_whole_rows_and_no_loose_signs(tmp_path):
    content = STUDY | {"name": "50 % of $x_1$ & more [β]", "metrics": [*KEYS, "m_sharpness#1"]}
    content["stages"] = STUDY["stages"] | {"sfron": {"method": "[SFRon_2] {α=1}"}}
    text = latex(collect(*make(tmp_path / "x", content, lambda job: unlearned(job) | {"m_sharpness#1": 1e-9})))
    body = re.sub(r"\\[\\&%$#_{}]|\\[a-z]+", lambda found: {r"\{": "", r"\}": "", r"\\": "\n"}.get(found[0], ""), text)
    code = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("%"))
    assert code.count("{") == code.count("}")
    assert code.count("$") % 2 == 0
    assert not re.search(r"[%#_]", code)
    assert not re.search(r"\\\\\s*\[(?!\d+pt\])", text)  # a bracket behind a row would be its spacing
    assert text.isascii()
    for table in re.findall(r"\\begin{tabular}.*?\\end{tabular}", text, re.DOTALL):
        columns = re.search(r"@{}(l r*|lr*)@{}", table)[1]
        rows = [line for line in table.splitlines() if line.endswith((r"\\", r"\\[2pt]"))]
        assert len(rows) == 1 + 4 + 3
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
    assert r"\textbf{82.5} {\scriptsize$\pm$ 0.7}" in text
    assert r"\scriptsize +2.0, 2.8 $\sigma$" in text


def test_report_is_self_contained_and_escaped(results):
    html = render(results, {"torch": "2"}, "lethe study a&b.yaml")
    assert not re.search(r"<script[^>]*src|<link|<img|@import|url\((?!#)", html)
    assert set(re.findall(r"https?://[\w./]+", html)) <= {"http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in html
    assert "Ends &amp; &lt;means&gt;" in html
    assert "model: &lt;b&gt;" in html
    assert "lethe study a&amp;b.yaml" in html
    assert html.count("<svg") == 2 * (6 + 2 + 2)
    assert "var(--m2)" in html
    assert not re.search(r"#0[1-5]0[0-9a-f]{3}\b", html)  # every colour mark was replaced
    identifiers = re.findall(r'<details id="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers)) == 4
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', html) if not link.startswith("#m")} <= set(identifiers)
    assert html.count('<table class="sortable">') == 2


def test_every_run_has_its_command_and_configuration(made, results):
    html = render(results, {}, "lethe study x")
    for outcome in made[1]:
        assert outcome.job.command.replace("'", "&#39;").replace('"', "&#34;") in html
    assert html.count("<summary>config.yaml</summary>") == 16
    for name in results.metrics():
        assert results.definition(name).definition.replace("'", "&#39;") in html


def test_finding_says_what_the_numbers_say(results):
    assert finding(results, "one") == (
        "SFRon comes closest to Retrain: 1.5 points apart on average (Original: 8.5), and 4.3 times faster."
    )


def test_numbers_as_people_write_them():
    assert number(-0.04, "%") == "0.0"
    assert signed(-1.25, "%") == "−1.2"
    assert signed(0.5) == "+0.500"
    assert signed(0.0) == "0.0"
    assert number(123.4, "s") == "123"
    assert [duration(seconds) for seconds in (4, 65, 7300)] == ["4.0 s", "1 min", "2 h 2 min"]


def test_a_study_of_optimizers_has_a_table_too(tmp_path):
    content = {
        "name": "Sharpness",
        "seeds": [0, 1],
        "reference": "sgd",
        "scenarios": {"clean": {"title": "Clean"}, "noisy": {"title": "40 % noise"}},
        "stages": {name: {"method": name.upper()} for name in ("sgd", "sam", "fsam")},
    }
    numbers = {"sgd": (90.0, 180.0), "sam": (92.0, 40.0), "fsam": (93.0, 28.0)}

    def measure(job):
        accuracy, eigenvalue = numbers[job.stage.name]
        job.folder.joinpath("metrics.json").write_text('{"val_accuracy": 0.9, "train_loss": 0.1, "lr-SGD": 1.0}')
        return {"test_accuracy": accuracy + job.seed, "largest_curvature": eigenvalue - job.seed, "note": "x"}

    study, outcomes = make(tmp_path / "a", content, measure)
    results = collect(study, outcomes)
    columns = ["test_accuracy", "val_accuracy", "largest_curvature", "stage_seconds"]
    assert results.columns("clean") == columns
    assert results.best("clean", "test_accuracy") == "FSAM"  # the highest, not the one closest to the baseline
    assert results.best("clean", "largest_curvature") is None  # nobody said what is good
    assert results.cell("clean", "SAM", "largest_curvature").gap == -140
    text = markdown(results)
    assert "| method | test accuracy / % | val accuracy | largest_curvature | stage time / s |" in text
    assert "0.900 ± 0.000" in text  # a fraction stays one
    html = write_results(study, outcomes, tmp_path / "a" / "out", ["s.yaml"]).read_text()
    assert re.search(r"under their own names: [^<]*largest_curvature", html)
    assert "Test accuracy against stage time" in html
    assert "MIA" not in html
    assert "forget" not in html.split("<footer", 1)[0].split("</style>", 1)[1]

    chosen = content | {"metrics": ["largest_curvature", "test_accuracy", "unheard_of"], "reference": None}
    results = collect(*make(tmp_path / "b", chosen, measure))
    assert results.columns("noisy") == ["largest_curvature", "test_accuracy"]
    assert "Not measured: unheard_of." in caption(results)
    assert results.cell("noisy", "SAM", "test_accuracy").gap is None


def test_figures_take_colours_and_fonts_from_the_page():
    rows = [Bar("A & B", 50.0, 2.0, "50.0 ± 2.0", 2), Bar("C", -3.0, None, "−3.0", 3)]
    points = [Point("A & B", 1.0, 2.0, 0.1, None, 2), Point("C", 500.0, 1.0, None, None, 3, competes=False)]
    for plot in (
        bar_plot(rows, 'a "title"', 100, rows[0]),
        bar_plot([], "nothing"),
        histogram(np.array([0.1, 0.9]), np.empty(0), np.array([0.5]), 2, "h"),
        histogram(np.empty(0), np.empty(0), np.empty(0), 2, "empty"),
        pareto_plot(points, "p", Axis("time, s", "lower"), Axis("accuracy, %", "higher")),
    ):
        svg = inline(plot)
        assert svg.startswith("<svg viewBox=")
        assert "font-family" not in svg
        assert "width=" not in svg.split(">", 1)[0]
    assert ">A &amp; B</text>" in svg
    assert ">accuracy, % (higher is better)</text>" in svg


def test_the_front_holds_what_no_other_method_beats():
    cheap, good, bad, goal = (
        Point(name, x, y, None, None, 0, name != "goal")
        for name, x, y in (("cheap", 1, 50), ("good", 3, 90), ("bad", 4, 60), ("goal", 0.5, 100))
    )
    found = front([bad, good, cheap, goal], "lower", "higher")
    assert [point.label for point in found] == ["cheap", "good"]


def test_figures_as_files(tmp_path):
    results = collect(*make(tmp_path / "x", STUDY | {"scenarios": {"one": {}}}))
    folder = tmp_path / "figures"
    files = write_figures(results, folder)
    kinds = ("bars", "pareto", "confidence")
    assert [path.name for path in files] == [kind + suffix for kind in kinds for suffix in (".png", ".pdf")]
    with Image.open(folder / "bars.png") as image:
        assert image.width > 2000
        assert image.getpixel((0, 0))[:3] == (255, 255, 255)
    pdf = (folder / "bars.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf  # journals refuse these fonts
    before = {path: path.stat().st_mtime_ns for path in files}
    assert write_figures(results, folder) == files
    assert {path: path.stat().st_mtime_ns for path in files} == before
    files[0].unlink()
    write_figures(results, folder)
    assert files[0].is_file()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_the_table_sorts_in_a_browser(results, tmp_path):
    press = "<script>document.querySelectorAll('thead button')[1].click()</script></body>"
    (tmp_path / "report.html").write_text(render(results, {}, "x").replace("</body>", press))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    command = [
        "chromium",
        *quiet,
        "--dump-dom",
        f"--user-data-dir={tmp_path}/profile",
        f"file://{tmp_path}/report.html",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    table = re.search(r"<tbody>.*?</tbody>", dom, re.DOTALL)[0]
    assert re.findall(r">(\w+)</a>", table) == ["Original", "FineTune", "SFRon", "Retrain"]
    assert dom.count('aria-sort="descending"') == 1


def test_explain_metrics_defines_those_of_the_table_first(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"metrics": ["zrf", "test_accuracy", "largest_curvature"]}, sort_keys=False))
    assert main(["study", str(path), "--explain-metrics"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("zrf") < text.index("test_accuracy") < text.index("largest_curvature") < text.index("average_gap")
    assert "One minus the bad-teacher divergence to an untrained network on the forget set." in text
    assert "largest_curvature not in the catalogue" in text
    assert not (tmp_path / "out").exists()


def test_curves_of_runs_become_a_panel(tmp_path):
    def measure(job):
        curve = np.array([10.0, np.nan, 50.0 + job.seed + 20 * (job.stage.name == "tune")])
        np.savez(job.folder / "evaluation.npz", accuracy_curve=curve, confusion=np.eye(2))
        return {"acc_last": 50.0}

    results = collect(*make(tmp_path, measure=measure))
    (run, *_) = results.select("one", "SFRon")
    np.testing.assert_array_equal(run.curves()["accuracy"], [10.0, np.nan, 50.0])
    (plot,) = curve_panels(results, "one")
    assert plot.title == "Accuracy over epochs"
    text = inline(plot)
    assert all(f">{method}<" in text for method in results.methods)
    assert "var(--m2)" in text
    page = render(results, {}, "lethe study x")
    assert page.count("Over the epochs") == 2
    assert {"one_curves.png", "ten_curves.pdf"} <= {path.name for path in write_figures(results, tmp_path / "figures")}


def test_names_at_the_ends_of_curves_do_not_touch():
    from matplotlib.figure import Figure

    lines = [Line(f"method {i}", np.array([0.0, 50.0 + 0.1 * i]), i) for i in range(5)]
    plot, figure = curve_plot(lines, "Accuracy"), Figure((4.6, 2.9))
    axes = figure.add_axes((0.1, 0.15, 0.6, 0.8))
    plot.draw(axes, PRINT)
    places = sorted(text.xy[1] for text in axes.texts)
    low, high = axes.get_ylim()
    assert np.diff(places).min() >= 13 * (high - low) / 210
    assert places[-1] <= high
