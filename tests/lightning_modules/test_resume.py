"""A run that is killed in the middle of an epoch and resumed ends in the same bits."""

import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conftest import ROOT
from tests.helpers import assert_same_bits, forgetful_digits, quiet_trainer, small_network
from tests.lightning_modules.runs import train
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.data import ForgetClasses
from torchlethe.lightning_modules import SFRon


@pytest.mark.parametrize(("kind", "kill_after"), [("classifier", 24), ("sfron", 17)])
def test_killed_and_resumed_is_the_same_run(kind, kill_after, tmp_path):
    command = [sys.executable, "-m", "tests.lightning_modules.runs", "resume", str(tmp_path), kind, str(kill_after)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert step == kill_after // 7 * 7
    resumed = train(kind, tmp_path, resume=True)
    straight = train(kind, tmp_path / "straight")
    assert resumed.global_step == straight.global_step
    assert_same_bits(resumed, straight)


def test_fine_tuning_resumes_to_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    class StopAfter(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 24:
                raise Stop

    from tests.lightning_modules import runs

    original = runs.ModelCheckpoint
    runs.ModelCheckpoint = StopAfter
    try:
        with pytest.raises(Stop):
            train("fine_tune", tmp_path)
    finally:
        runs.ModelCheckpoint = original
    assert_same_bits(train("fine_tune", tmp_path, resume=True), train("fine_tune", tmp_path / "straight"))


def test_a_checkpoint_of_another_split_or_another_original_is_refused(tmp_path):
    train("sfron", tmp_path)
    trainer = quiet_trainer(plugins=[AtomicCheckpointIO()])
    module = SFRon(small_network(), 10, steps=30, forget_every=4, slow_beta=0.9)
    other = forgetful_digits(ForgetClasses([3]))
    with pytest.raises(ValueError, match="split"):
        trainer.fit(module, datamodule=other, ckpt_path=tmp_path / "last.ckpt")


def test_steps_are_counted_by_batch(tmp_path):
    module = train("sfron", tmp_path)
    assert module.global_step == 30
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 28
    assert checkpoint["unlearning"]["split_hash"]
    # one bit a weight, and no copy of the network beside the slow weights
    weights = sum(p.numel() for p in module.network.parameters())
    assert checkpoint["unlearning"]["update"]["mask"]["bits"].numel() == -(-weights // 8)
