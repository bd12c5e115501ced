"""The digits study, cut down, killed at random moments: the same command ends in the same table."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.study.stages import plan
from torchlethe._cli.catalog import configs_folder
from torchlethe.cli import _run_stage, main
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.workers import Workers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes are forked")
TIMES = ("seconds", "speed_up")


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """The shipped study with one seed, one request, few steps, and a checkpoint after each epoch."""
    monkeypatch.chdir(tmp_path)
    source = configs_folder() / "digits"
    content = yaml.safe_load((source / "study.yaml").read_text())
    content["seeds"] = [3]
    del content["scenarios"]["ten_percent"], content["defaults"]["set"]["trainer.enable_checkpointing"]
    for stage, settings in content["stages"].items():
        short = {"model.init_args.steps": 20} if stage == "sfron" else {"trainer.max_epochs": 6}
        settings["set"] |= short if settings.get("command") != "test" else {}
    for path in source.glob("*.yaml"):
        Path(path.name).write_text(path.read_text())

    def write(**changes):
        Path("study.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return content

    write()
    return write


def numbers(root):
    """What the runs measured, but for the time they took."""
    found = {}
    for path in sorted(Path(root).rglob("evaluation.json")):
        values = json.loads(path.read_text())
        values.pop("meta")
        place = path.relative_to(root).as_posix()
        found[place] = {key: value for key, value in values.items() if not any(part in key for part in TIMES)}
    return found


def study(*words):
    command = [sys.executable, "-m", "torchlethe.cli", "study", "study.yaml", "--workers", "2", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_study_killed_at_three_random_points_ends_the_same(digits):
    assert main(["study", "study.yaml", "--output", "one/whole", "--workers", "2"]) == 0
    chance = random.Random(time.time_ns())
    seen = []
    for count in sorted(chance.sample(range(5), 3)):  # stages done, and a moment more
        process = study("--output", "two/killed")
        while len(list(Path("two").rglob("done.json"))) < count and process.poll() is None:
            time.sleep(0.02)
        if not count:
            time.sleep(chance.uniform(0, 8))
        time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append((count, len(list(Path("two").rglob("done.json")))))
    assert main(["study", "study.yaml", "--output", "two/killed", "--workers", "2"]) == 0
    assert numbers("two/killed") == numbers("one/whole"), seen
    assert len(numbers("one/whole")) == 4
    for name in ("table.md", "table.csv", "report.html"):
        assert (Path("two/killed") / name).is_file()


def test_a_training_stage_goes_on_from_its_checkpoint(digits):
    content = digits()
    only = {"original": content["stages"]["original"]}
    only["original"]["set"]["trainer.max_epochs"] = 40
    digits(stages=only, reference=None, original=None, scenarios={})
    (whole,), (job,) = (plan_jobs(load_study("study.yaml"), output) for output in ("whole", "cut"))
    assert run_jobs([whole], _run_stage, launcher=Workers(_run_stage, 1, gpus=[]))[0].status == "done"
    workers = Workers(_run_stage, 1, gpus=[])
    workers.start(job)
    while not any("epoch=2" in path.name for path in job.folder.rglob("*.ckpt")):
        time.sleep(0.005)
    workers.stop()
    assert not (job.folder / "done.json").exists()
    (outcome,) = run_jobs([job], _run_stage, launcher=Workers(_run_stage, 1, gpus=[]))
    log = (job.folder / "log.txt").read_text()
    assert outcome.status == "done", log
    assert "goes on from" in log
    assert (job.folder / "weights.safetensors").read_bytes() == (whole.folder / "weights.safetensors").read_bytes()
    # not where something changed meanwhile, and not when it is forced
    (job.folder / "done.json").unlink()
    digits(stages=only, reference=None, original=None, scenarios={}, seeds=[4])
    (other,) = plan_jobs(load_study("study.yaml"), "cut")
    other.folder.parent.joinpath("seed-3").rename(other.folder)
    run_jobs([other], _run_stage, launcher=Workers(_run_stage, 1, gpus=[]))
    assert "goes on from" not in (other.folder / "log.txt").read_text()


def test_a_damaged_checkpoint_starts_the_stage_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def stage(command, words):
        calls.append(words)
        folder = Path(next(word for word in words if "default_root_dir" in word).partition("=")[2])
        if len(calls) == 1:
            _checkpoint(folder / "checkpoints" / "epoch=0.ckpt")
            raise KeyboardInterrupt
        if any("ckpt_path" in word for word in words):
            (folder / "half.txt").touch()
            raise RuntimeError("this checkpoint does not fit")
        (folder / "weights.safetensors").touch()

    jobs = plan({"a": {"set": {"trainer.max_epochs": 5}}})
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, stage)
    assert run_jobs(jobs, stage)[0].status == "done"
    assert ["ckpt_path" in " ".join(words) for words in calls] == [False, True, False]
    assert not (jobs[0].folder / "half.txt").exists()
    assert "does not fit" in (jobs[0].folder / "log.txt").read_text()


def test_a_checkpoint_of_a_complete_training_is_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def stage(command, words):
        calls.append(words)
        folder = Path(next(word for word in words if "default_root_dir" in word).partition("=")[2])
        if len(calls) == 1:
            _checkpoint(folder / "checkpoints" / "epoch=0.ckpt")
            raise KeyboardInterrupt

    jobs = plan({"a": {"set": {"trainer.max_epochs": 1}}})
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, stage)
    assert run_jobs(jobs, stage)[0].status == "done"
    assert not any("ckpt_path" in word for word in calls[1])


def _checkpoint(path):
    """What Lightning saves after one epoch of a real fit."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(path)


def test_one_study_at_a_time_in_a_folder(digits, capfd):
    process = study("--output", "out")
    try:
        while not Path("out/.lock").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        assert main(["study", "study.yaml", "--output", "out"]) == 2
        assert "another study is writing to 'out'" in capfd.readouterr().err
    finally:
        process.kill()
        process.wait()


def test_a_broken_stage_and_an_edited_one(digits, capfd):
    content = digits()
    stages = content["stages"]
    broken = stages | {"sfron": {**stages["sfron"], "set": stages["sfron"]["set"] | {"model.init_args.steps": -1}}}
    digits(stages=broken)
    assert main(["study", "study.yaml", "--output", "out"]) == 1
    error = capfd.readouterr().err
    assert "4 stages run, 0 kept, 1 failed" in error
    assert "failed sfron · Forget one class · seed 3: steps is -1" in error
    folder = Path("out/sfron/one_class/seed-3")
    assert "Traceback" in (folder / "error.txt").read_text()
    digits(stages=stages)  # repaired: only this stage runs
    assert main(["study", "study.yaml", "--output", "out", "--dry-run"]) == 0
    error = capfd.readouterr().err
    assert "run   sfron · Forget one class · seed 3  it failed the last time" in error
    assert "1 of 5 stages would run" in error
    assert main(["study", "study.yaml", "--output", "out"]) == 0
    assert "1 stages run, 4 kept, 0 failed" in capfd.readouterr().err
    Path("fine_tune.yaml").write_text(Path("fine_tune.yaml").read_text().replace("0.01", "0.02"))
    assert main(["study", "study.yaml", "--output", "out", "--dry_run"]) == 0
    error = capfd.readouterr().err
    assert "run   fine_tune · Forget one class · seed 3  the file fine_tune.yaml changed" in error
    assert "1 of 5 stages would run" in error
    # another study has the same stages: what is done here need not run there
    assert main(["study", "study.yaml", "--output", "other", "--dry-run"]) == 0
    error = capfd.readouterr().err
    assert "take  original · seed 3  from" in error
    assert "run   fine_tune" in error
    assert main(["study", "study.yaml", "--output", "other", "--dry-run", "--no-reuse"]) == 0
    assert "5 of 5 stages would run" in capfd.readouterr().err


def test_a_second_run_leaves_the_report_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    plan({"a": {}}, seeds=(0, 1))
    command = ["study", "study.yaml", "--output", "out"]
    assert study_command(command[1:]) == 0
    written = Path("out/report.html").stat().st_mtime_ns
    assert study_command(command[1:]) == 0
    assert Path("out/report.html").stat().st_mtime_ns == written
    Path("study.yaml").write_text(Path("study.yaml").read_text() + "name: Another title\n")
    assert study_command(command[1:]) == 0
    assert "Another title" in Path("out/report.html").read_text()
    assert "0 stages run, 2 kept" in capfd.readouterr().err


def study_command(words):
    from tests.study.stages import run_stage
    from torchlethe.study.command import study

    return study(words, run_stage)
