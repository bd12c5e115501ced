"""Skipping, rerunning and surviving, with stages that only write a file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchlethe._cli.errors import UsageError
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.keys import identify
from torchlethe.study.runner import why
from torchlethe.study.stage import execute

STUDY = {
    "seeds": [0, 1],
    "stages": {
        "base": {"per": ["seed"], "config": ["base.yaml"]},
        "method": {"method": "M", "set": {"weights": "${base.weights}"}},
        "other": {"method": "O", "set": {"size": 3}},
    },
}


class Stages:
    """Runs a stage by writing its weights: a copy of its options; counts the calls."""

    def __init__(self, broken=()):
        self.calls = []
        self.broken = broken

    def __call__(self, command, words):
        options = dict(word[2:].split("=", 1) for word in words)
        folder = Path(options["trainer.default_root_dir"])
        self.calls.append(folder.as_posix())
        if any(name in folder.as_posix() for name in self.broken):
            raise ValueError("alpha is -1, it must be above 0")
        content = Path(options["config"]).read_text() if "config" in options else json.dumps(options["seed"])
        (folder / "weights.safetensors").write_text(content)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("a: 1\n")

    def jobs(output="out", **changes):
        content = yaml.safe_load(yaml.safe_dump(STUDY))
        content["defaults"] = {"set": {"seed": "${seed}"}}
        for stage, settings in changes.items():
            content["stages"][stage]["set"] = settings
        Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return plan_jobs(load_study("study.yaml"), output)

    return jobs


def statuses(outcomes):
    return {outcome.job.folder.relative_to("out").as_posix(): outcome.status for outcome in outcomes}


def test_a_second_run_does_nothing(make):
    first, second = Stages(), Stages()
    assert set(statuses(run_jobs(make(), first)).values()) == {"done"}
    assert len(first.calls) == 6
    outcomes = run_jobs(make(), second)
    assert set(statuses(outcomes).values()) == {"kept"}
    assert second.calls == []
    assert all(outcome.seconds > 0 for outcome in outcomes)


def test_a_changed_setting_reruns_its_stage_alone(make):
    run_jobs(make(), Stages())
    stages = Stages()
    run_jobs(make(other={"size": 4}), stages)
    assert stages.calls == ["out/other/all/seed-0", "out/other/all/seed-1"]


def test_a_changed_file_reruns_what_depends_on_its_result(make):
    run_jobs(make(), Stages())
    Path("base.yaml").write_text("a: 2\n")
    stages = Stages()
    run_jobs(make(), stages)
    assert len(stages.calls) == 4
    assert not any("other" in call for call in stages.calls)


def test_a_file_named_in_a_configuration_counts(make):
    Path("base.yaml").write_text("network: net.yaml\n")
    Path("net.yaml").write_text("width: 1\n")
    run_jobs(make(), Stages())
    Path("net.yaml").write_text("width: 2\n")
    stages = Stages()
    run_jobs(make(), stages)
    assert stages.calls[:2] == ["out/base/seed-0", "out/base/seed-1"]


def test_force_reruns_and_equal_results_stop_there(make):
    run_jobs(make(), Stages())
    stages = Stages()
    run_jobs(make(), stages, force=["base"])
    assert stages.calls == ["out/base/seed-0", "out/base/seed-1"]


def test_a_moved_output_is_still_done(make):
    run_jobs(make(), Stages())
    Path("out").rename("moved")
    stages = Stages()
    run_jobs(make(output="moved"), stages)
    assert stages.calls == []


def test_other_code_reruns_unless_it_is_ignored(make, monkeypatch):
    run_jobs(make(), Stages())
    monkeypatch.setattr("torchlethe.study.keys.code_version", lambda search: "another")
    assert {why(job) for job in make()} == {"the code of torchlethe changed"}
    assert {why(job, ignore_code=True) for job in make()} == {""}
    assert {why(job, ignore_code=True) for job in make(other={"size": 4}) if job.stage.name == "other"} == {
        "size changed (3 → 4)"
    }


def test_a_failure_after_the_code_changed_says_so(make, monkeypatch):
    def fails(command, words):
        raise ValueError("Option 'crop' is not accepted")

    job = make()[0]
    identity = identify(job)
    addition = "; the code of torchlethe has changed since the study began: start it again"
    message = execute(job, fails, identity=identity).message
    assert "Option 'crop' is not accepted" in message
    assert addition not in message
    monkeypatch.setattr("torchlethe.study.keys.code_version", lambda search: "another")
    assert execute(job, fails, identity=identity).message == message + addition


def test_why_names_the_part_that_changed(make):
    run_jobs(make(), Stages())
    by_title = {job.title: job for job in make(other={"size": 4, "depth": 1})}
    assert why(by_title["other · all · seed 0"]) == "size changed (3 → 4), depth is new"
    Path("base.yaml").write_text("a: 2  # two\n")
    reasons = {job.title: why(job) for job in make()}
    assert reasons["base · seed 1"] == "the file base.yaml changed"
    assert reasons["other · all · seed 0"] == ""
    Path("base.yaml").write_text("# a comment is no change\na: 1\n")
    assert {why(job) for job in make()} == {""}
    Path("out/base/seed-0/weights.safetensors").write_text("others")
    reasons = {job.title: why(job) for job in make()}
    assert reasons["method · all · seed 0"] == "${base.weights} changed"
    assert reasons["method · all · seed 1"] == ""
    Path("out/base/seed-0/weights.safetensors").unlink()
    assert why(make()[2]) == "its input ${base.weights} is missing"


def test_a_stage_that_only_waits_for_another_follows_it(make):
    def study(size):
        content = {"stages": {"first": {"set": {"size": size}}, "second": {"needs": ["first"], "set": {"size": 1}}}}
        content["defaults"] = {"set": {"seed": 0}}
        Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return plan_jobs(load_study("study.yaml"), "out")

    run_jobs(study(1), Stages())
    assert {why(job) for job in study(1)} == {""}
    stages = Stages()
    run_jobs(study(2), stages)
    assert stages.calls == ["out/first/all/seed-0", "out/second/all/seed-0"]


def test_a_failure_blocks_only_what_needs_it(make):
    outcomes = run_jobs(make(), Stages(broken=["base/seed-0"]))
    found = statuses(outcomes)
    assert found["base/seed-0"] == "failed"
    assert found["method/all/seed-0"] == "blocked"
    assert found["method/all/seed-1"] == found["other/all/seed-0"] == "done"
    failed = next(outcome for outcome in outcomes if outcome.status == "failed")
    assert failed.message.startswith("alpha is -1, it must be above 0")
    assert "Traceback" in (failed.job.folder / "error.txt").read_text()
    stages = Stages()
    assert set(statuses(run_jobs(make(), stages)).values()) == {"done", "kept"}
    assert stages.calls == ["out/base/seed-0", "out/method/all/seed-0"]
    assert not (failed.job.folder / "error.txt").exists()


def test_a_rerun_starts_from_a_clean_folder(make):
    run_jobs(make(), Stages())
    stale = Path("out/other/all/seed-0/stale.json")
    stale.write_text("{}")
    run_jobs(make(other={"size": 4}), Stages())
    assert not stale.exists()


def test_a_foreign_folder_is_left_alone(make):
    Path("out/base/seed-0").mkdir(parents=True)
    Path("out/base/seed-0/thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="no stage of a study"):
        run_jobs(make(), Stages())
    assert Path("out/base/seed-0/thesis.tex").read_text() == "mine"


def test_what_a_stage_says_goes_to_its_log(make, capsys):
    def talk(command, words):
        sys.stdout.write("to the log\n")
        Stages()(command, words)

    run_jobs(make(), talk)
    log = Path("out/base/seed-0/log.txt").read_text()
    assert log.startswith("$ lethe fit --config=base.yaml")
    assert "to the log" in log
    assert "to the log" not in capsys.readouterr().out


def test_a_killed_study_goes_on_where_it_was(make, tmp_path):
    make()
    program = """
import os, signal, sys
from pathlib import Path
from torchlethe.study import load_study, plan_jobs, run_jobs
calls, kill_at = [], int(sys.argv[1])
def stage(command, words):
    options = dict(word[2:].split("=", 1) for word in words)
    folder = Path(options["trainer.default_root_dir"])
    calls.append(folder)
    (folder / "weights.safetensors").write_text(options["seed"])
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
run_jobs(plan_jobs(load_study("study.yaml"), "out"), stage)
print(len(calls))
"""
    ran = []
    for kill_at in ("3", "0"):
        found = subprocess.run(
            [sys.executable, "-c", program, kill_at],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        ran.append((found.returncode, found.stdout.strip()))
    assert ran == [(-signal.SIGKILL, ""), (0, "4")]
    assert set(statuses(run_jobs(make(), Stages())).values()) == {"kept"}
