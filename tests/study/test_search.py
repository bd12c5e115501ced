"""Search stages: what is tried, what is chosen, and that a kill changes neither."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.study.trials import Stages
from torchlethe._cli.catalog import configs_folder
from torchlethe._cli.errors import UsageError
from torchlethe._cli.lightning import run
from torchlethe.cli import main
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.search import trial_job
from torchlethe.study.search_space import parse_search

LR = "model.init_args.optimizer.init_args.lr"
SPACE = {"lr": {"low": 1e-3, "high": 1.0, "log": True}, "size": {"low": 1, "high": 64, "int": True}, "kind": ["a", "b"]}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jobs(output="out", seeds=(0,), settings=None, **search):
    """A study of one search, by default of six trials with TPE."""
    search = {"metric": "val_loss", "trials": 6, "space": SPACE, **search}
    stage = {"per": ["seed"], "search": {key: value for key, value in search.items() if value is not None}}
    content = {"seeds": list(seeds), "stages": {"tuning": {**stage, "set": settings or {}}}}
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return plan_jobs(load_study("study.yaml"), output)


def table(folder="out/tuning/seed-0"):
    with (Path(folder) / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def values(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_best_of_the_trials_is_kept(sampler):
    (outcome,) = run_jobs(jobs(sampler=sampler, trials=15), Stages())
    assert outcome.status == "done"
    rows = table()
    assert [int(row["trial"]) for row in rows] == list(range(15))
    for row in rows:
        assert 1e-3 <= float(row["lr"]) <= 1
        assert 1 <= int(row["size"]) <= 64
        assert row["kind"] in ("a", "b")
    assert len({row["lr"] for row in rows}) == 15
    best = min(rows, key=lambda row: float(row["val_loss"]))
    found = yaml.safe_load(Path("out/tuning/seed-0/best.yaml").read_text())
    assert (found["lr"], found["size"], found["kind"]) == (float(best["lr"]), int(best["size"]), best["kind"])
    kept = list(Path("out").rglob("*.safetensors"))
    number = f"{int(best['trial']):03d}"
    assert sorted(path.parent.name for path in kept) == [number, "seed-0"]
    assert json.loads(Path("out/tuning/seed-0/weights.safetensors").read_text())["lr"] == best["lr"]


def test_tpe_learns_from_the_trials_before():
    for sampler in ("tpe", "random"):
        run_jobs(jobs(sampler, sampler=sampler, trials=30, space={"lr": {"low": 0.0, "high": 1.0}}), Stages())
    late = {s: sorted(float(row["val_loss"]) for row in table(f"{s}/tuning/seed-0")[10:]) for s in ("tpe", "random")}
    assert late["tpe"][10] < late["random"][10] / 2  # the medians


def test_each_seed_of_the_study_searches_on_its_own():
    run_jobs(jobs(seeds=[0, 1]), Stages())
    assert values(table()) != values(table("out/tuning/seed-1"))
    run_jobs(jobs("again", seeds=[0, 1], seed=0), Stages())  # the sampler's own seed wins
    assert values(table("again/tuning/seed-0")) == values(table("again/tuning/seed-1")) == values(table())


def test_a_grid_runs_each_point_once():
    space = {"lr": [0.1, 0.2, 0.3], "kind": ["a", "b"]}
    stages = Stages()
    run_jobs(jobs(sampler="grid", trials=None, space=space), stages)
    points = [(row["lr"], row["kind"]) for row in table()]
    assert points == [(lr, kind) for lr in ("0.1", "0.2", "0.3") for kind in ("a", "b")]
    assert [(call["lr"], call["kind"]) for call in stages.calls] == points
    assert yaml.safe_load(Path("out/tuning/seed-0/best.yaml").read_text()) == {"lr": 0.1, "kind": "a"}


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_an_interrupted_search_goes_on_where_it_was(sampler):
    space = {"lr": [0.1, 0.2, 0.3], "kind": ["a", "b"]} if sampler == "grid" else SPACE
    run_jobs(jobs("whole", sampler=sampler, space=space), Stages())
    whole = values(table("whole/tuning/seed-0"))
    calls = []
    for stop in (1, 3, 2):
        stages = Stages(stop)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs(sampler=sampler, space=space), stages)
        calls += stages.calls
    stages = Stages()
    (outcome,) = run_jobs(jobs(sampler=sampler, space=space), stages)
    assert outcome.status == "done"
    assert values(table()) == whole
    assert len(calls + stages.calls) == 6 + 3  # each interruption cost its own trial
    stages = Stages()
    assert run_jobs(jobs(sampler=sampler, space=space), stages)[0].status == "kept"
    assert stages.calls == []


def test_a_killed_search_goes_on_where_it_was():
    whole = jobs("whole")
    run_jobs(whole, Stages())
    jobs()
    program = """
import os, signal, sys
from torchlethe.study import load_study, plan_jobs, run_jobs
from tests.study.trials import Stages
stages, kill_at = Stages(), int(sys.argv[1])
def run_stage(command, words):
    stages(command, words)
    if len(stages.calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
run_jobs(plan_jobs(load_study("study.yaml"), "out"), run_stage)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, "-c", program, "3"], env=environment, timeout=60, check=False)
    assert found.returncode == -signal.SIGKILL
    journal = Path("out/tuning/seed-0/search.log")
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"wor')  # a line that was cut off
    Path(f"{journal}.lock").symlink_to(journal)
    stages = Stages()
    run_jobs(jobs(), stages)
    assert len(stages.calls) == 4
    assert values(table()) == values(table("whole/tuning/seed-0"))


def test_a_changed_search_starts_again():
    run_jobs(jobs(), Stages())
    stages = Stages()
    run_jobs(jobs(trials=3), stages)
    assert len(stages.calls) == len(table()) == 3


def test_a_failed_trial_is_counted_and_named():
    broken = Stages(broken=lambda options: options["lr"] == "0.1")
    run_jobs(jobs(sampler="grid", trials=None, space={"lr": [0.1, 0.5, 0.2]}), broken)
    rows = table()
    assert [row["val_loss"] for row in rows] == ["", "0.41000000000000003", "0.11"]
    assert rows[0]["message"].startswith("the loss is nan")
    assert "Traceback" in Path("out/tuning/seed-0/trials/000/error.txt").read_text()
    assert yaml.safe_load(Path("out/tuning/seed-0/best.yaml").read_text()) == {"lr": 0.2}


def test_a_search_without_a_result_fails():
    (outcome,) = run_jobs(jobs(), Stages(broken=lambda options: True))
    assert outcome.status == "failed"
    assert outcome.message.startswith("all 6 trials failed, the first with: the loss is nan")
    (outcome,) = run_jobs(jobs("other", metric="val_nan", direction="minimize"), Stages())
    assert outcome.message == "all 6 trials failed, the first with: 'val_nan' is None."


def test_a_metric_that_no_trial_leaves_stops_the_search():
    stages = Stages()
    (outcome,) = run_jobs(jobs(metric="val_los", direction="minimize"), stages)
    assert outcome.message.startswith("trial 0 has no metric 'val_los'; did you mean 'val_loss'?")
    assert len(stages.calls) == 1


def test_values_of_any_kind_reach_the_trials_as_they_are():
    space = {"lr": [0.1], "callbacks+": [{"class_path": "A"}, {"class_path": "B"}], "net.name": [None, "none", True, 1]}
    stages = Stages()
    run_jobs(jobs(sampler="grid", trials=None, space=space), stages)
    assert [call["net.name"] for call in stages.calls[:4]] == ["null", "none", "true", "1"]
    assert [json.loads(call["callbacks+"])["class_path"] for call in stages.calls] == list("AAAABBBB")
    found = yaml.safe_load(Path("out/tuning/seed-0/best.yaml").read_text())
    assert found == {"lr": 0.1, "callbacks+": {"class_path": "A"}, "net": {"name": None}}


WRONG = {
    "a metric of the test data": ({"metric": "test_accuracy"}, ["metric", "'test_accuracy'", "test data"]),
    "an attack, which uses test data": ({"metric": "mia_entropy_logistic"}, ["test data"]),
    "a gap, which uses test data": ({"metric": "average_gap"}, ["test data"]),
    "the reference's test accuracy": ({"metric": "reference_test_accuracy"}, ["test data"]),
    "a metric of the training data": ({"metric": "train_loss"}, ["training data", "'val_loss'"]),
    "no metric": ({"metric": None}, ["metric", "None"]),
    "no direction": ({"metric": "val_f1"}, ["direction", "'val_f1' does not tell it", "give minimize or maximize"]),
    "an unknown direction": ({"direction": "down"}, ["'down'", "minimize, maximize"]),
    "an unknown sampler": ({"sampler": "bayes"}, ["'bayes'", "tpe, random, grid"]),
    "an unknown key": ({"trails": 3}, ["'trails'", "did you mean 'trials'"]),
    "no trials": ({"trials": 0}, ["trials", "0", "at least 1"]),
    "no space": ({"space": {}}, ["space", "dotted keys"]),
    "a grid over a range": ({"sampler": "grid"}, ["space.lr", "a grid needs a list"]),
    "half a grid": ({"sampler": "grid", "trials": 3, "space": {"lr": [1, 2]}}, ["trials", "3", "2 points"]),
    "a value twice": ({"space": {"lr": [1, 1]}}, ["space.lr", "twice"]),
    "an empty range": ({"space": {"lr": {"low": 1, "high": 1}}}, ["space.lr", "low < high"]),
    "a logarithm of zero": ({"space": {"lr": {"low": 0, "high": 1, "log": True}}}, ["0 < low < high"]),
    "a number that YAML takes for text": ({"space": {"lr": {"low": "1e-3", "high": 1}}}, ["'1e-3'", "1.0e-3"]),
    "half an integer": ({"space": {"n": {"low": 1.5, "high": 2, "int": True}}}, ["1.5", "whole numbers"]),
    "an unknown key of a range": ({"space": {"lr": {"low": 0, "high": 1, "step": 2}}}, ["space.lr", "'step'"]),
    "a place to write": ({"space": {"trainer.default_root_dir": ["a", "b"]}}, ["a study decides"]),
    "a reference": ({"space": {"lr": ["${seed}"]}}, ["space.lr", "reference"]),
    "a seed in words": ({"seed": "one"}, ["seed", "'one'", "whole number"]),
}


@pytest.mark.parametrize(("change", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_search_is_refused_before_anything_runs(change, parts):
    with pytest.raises(UsageError) as caught:
        jobs(**{"metric": "val_loss", **change})
    message = str(caught.value)
    assert message.startswith("study.yaml: 'stages.tuning.search")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("command", "method"), [("test", None), ("predict", None), ("fit", "SFRon")])
def test_a_search_in_the_wrong_stage_is_refused(command, method):
    with pytest.raises(UsageError, match=f"'search' stands in .*'{method or command}'"):
        parse_search({"metric": "val_loss", "trials": 1, "space": SPACE}, command=command, method=method)


def test_a_real_search_and_the_stage_that_uses_its_result(tmp_path, capfd):
    folder = configs_folder() / "digits"
    common = {"trainer.max_epochs": 1, "trainer.enable_checkpointing": False, "seed_everything": 0}
    recipe = [str(folder / "data.yaml"), str(folder / "original.yaml")]
    search = {"sampler": "grid", "metric": "val_accuracy", "space": {LR: [1.0e-6, 0.05]}}
    stages = {
        "tuning": {"per": [], "config": recipe, "set": {"data.init_args.validation": 0.2}, "search": search},
        "final": {"per": [], "config": [*recipe, "${tuning.best}"]},
    }
    Path("study.yaml").write_text(yaml.safe_dump({"defaults": {"set": common}, "stages": stages}, sort_keys=False))
    planned = plan_jobs(load_study("study.yaml"), "out")
    assert [outcome.status for outcome in run_jobs(planned, run)] == ["done", "done"], capfd.readouterr().err
    rows = table("out/tuning")
    assert [row[LR] for row in rows] == ["1e-06", "0.05"]
    assert float(rows[0]["val_accuracy"]) < 0.3 < float(rows[1]["val_accuracy"])
    found = yaml.safe_load(Path("out/final/config.yaml").read_text())
    assert (
        found["model"]["init_args"]["optimizer"]["init_args"] | {"lr": 0.05, "momentum": 0.9}
        == (found["model"]["init_args"]["optimizer"]["init_args"])
    )
    assert Path("out/tuning/weights.safetensors").is_file()
    assert [outcome.status for outcome in run_jobs(planned, run)] == ["kept", "kept"]


def test_the_shipped_search_is_sound(tmp_path, capsys):
    study = load_study(configs_folder() / "digits" / "search.yaml")
    (job,) = [job for job in plan_jobs(study, tmp_path) if job.stage.search is not None]
    search = parse_search(job.stage.search)
    settings = {key: value[-1] if isinstance(value, list) else value["low"] for key, value in search.space.items()}
    trial = trial_job(job, 3, settings)
    assert main(["fit", *trial.words, "--print_config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.005
    assert found["trainer"]["default_root_dir"] == str(job.folder / "trials/003")
    assert found["data"]["init_args"]["validation"] == 200
