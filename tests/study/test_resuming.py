"""A stage that was cut off goes on from its checkpoint, or starts again where that would change its result."""

import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel

from tests.study.digits import small_study, write
from tests.study.stages import plan
from torchlethe.cli import _run_stage
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.workers import Workers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes are forked")
def test_a_training_stage_goes_on_from_its_checkpoint(digits):
    content = small_study()
    stage = content["stages"]["original"]
    stage["set"] |= {"trainer.max_epochs": 8, "trainer.callbacks+": {"class_path": "tests.study.dying.DieOnce"}}
    write({"seeds": [3], "defaults": content["defaults"], "stages": {"original": stage}})
    (whole,), (job,) = (plan_jobs(load_study("study.yaml"), output) for output in ("whole", "cut"))

    def run(job):
        (outcome,) = run_jobs([job], _run_stage, launcher=Workers(_run_stage, 1, gpus=[]))
        return outcome.status, (job.folder / "log.txt").read_text()

    assert run(job)[0] == "failed"
    assert "ended by SIGKILL" in (job.folder / "error.txt").read_text()
    Path("mercy").touch()
    status, log = run(job)
    assert (status, "goes on from" in log) == ("done", True), log
    status, log = run(whole)
    assert (status, "goes on from" in log) == ("done", False), log
    assert (job.folder / "weights.safetensors").read_bytes() == (whole.folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What Lightning saves after one epoch of a real fit, and when that epoch was the last one by early stopping."""
    folder = tmp_path_factory.mktemp("checkpoints")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for name, threshold in (("running", -1.0), ("stopped", 100.0)):
        stopping = EarlyStopping("val_loss", stopping_threshold=threshold)
        limits = {"limit_train_batches": 1, "limit_val_batches": 1, "max_epochs": 1}
        trainer = Trainer(callbacks=[stopping], enable_checkpointing=False, **limits, **quiet)
        trainer.fit(Measured())
        trainer.save_checkpoint(folder / name)
    return folder


class Measured(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))


class Interrupted:
    """A stage that is cut off where it has saved a checkpoint, and counts its calls."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        self.calls = []

    def __call__(self, command, words):
        self.calls.append(any("ckpt_path" in word for word in words))
        self.folder = Path(next(word for word in words if "default_root_dir" in word).partition("=")[2])
        if len(self.calls) == 1:
            (self.folder / "checkpoints").mkdir()
            shutil.copy(self.checkpoint, self.folder / "checkpoints" / "epoch=0.ckpt")
            raise KeyboardInterrupt
        if self.calls[-1]:
            self.go_on()

    def go_on(self):
        """Do nothing, well."""


@pytest.mark.parametrize(
    ("name", "before", "after", "goes_on"),
    [
        ("running", {"trainer.max_epochs": 5}, {"trainer.max_epochs": 5}, True),
        ("running", {"trainer.max_epochs": 5}, {"trainer.max_epochs": 6}, False),
        ("running", {"trainer.max_epochs": 1}, {"trainer.max_epochs": 1}, False),
        ("running", {}, {}, False),
        ("stopped", {"trainer.max_epochs": 5}, {"trainer.max_epochs": 5}, False),
    ],
    ids=["in the middle", "something changed", "all epochs are done", "it ends by itself", "it stopped early"],
)
def test_which_checkpoints_are_gone_on_from(tmp_path, monkeypatch, checkpoints, name, before, after, goes_on):
    monkeypatch.chdir(tmp_path)
    stage = Interrupted(checkpoints / name)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(plan({"a": {"set": before}}), stage)
    assert run_jobs(plan({"a": {"set": after}}), stage)[0].status == "done"
    assert stage.calls == [False, goes_on]


def test_a_stage_that_is_forced_starts_again(tmp_path, monkeypatch, checkpoints):
    monkeypatch.chdir(tmp_path)
    stage = Interrupted(checkpoints / "running")
    jobs = plan({"a": {"set": {"trainer.max_epochs": 5}}})
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, stage)
    assert run_jobs(jobs, stage, force=["a"])[0].status == "done"
    assert stage.calls == [False, False]


def test_a_damaged_checkpoint_starts_the_stage_again(tmp_path, monkeypatch, checkpoints):
    monkeypatch.chdir(tmp_path)

    class Broken(Interrupted):
        def go_on(self):
            (self.folder / "half.txt").touch()
            raise RuntimeError("this checkpoint does not fit")

    stage = Broken(checkpoints / "running")
    jobs = plan({"a": {"set": {"trainer.max_epochs": 5}}})
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, stage)
    assert run_jobs(jobs, stage)[0].status == "done"
    assert stage.calls == [False, True, False]
    assert not (jobs[0].folder / "half.txt").exists()
    assert "does not fit" in (jobs[0].folder / "log.txt").read_text()


@pytest.mark.parametrize(("after", "goes_on"), [({}, True), ({"model.radius": 4}, False)], ids=["same", "changed"])
def test_a_prediction_finds_what_it_left(tmp_path, monkeypatch, after, goes_on):
    monkeypatch.chdir(tmp_path)
    found = []

    def predicting(command, words):
        folder = Path(next(word for word in words if "default_root_dir" in word).partition("=")[2])
        found.append((folder / "prepared" / "begun.pt").exists())
        (folder / "prepared").mkdir(exist_ok=True)
        (folder / "prepared" / "begun.pt").touch()
        if len(found) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(plan({"a": {"command": "predict"}}), predicting)
    assert run_jobs(plan({"a": {"command": "predict", "set": after}}), predicting)[0].status == "done"
    assert found == [False, goes_on]
