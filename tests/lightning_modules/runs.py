"""The runs that the resume and rank tests repeat; also a script, since a process has to be killed for real.

python -m tests.lightning_modules.runs resume FOLDER KIND KILL_AT     train, die by SIGKILL after KILL_AT batches
python -m tests.lightning_modules.runs ranks FOLDER RANK PORT         one of two ranks of every kind of run
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers import (
    cosine,
    digits,
    forgetful_digits,
    norm_free_network,
    quiet_trainer,
    sgd,
    small_network,
)
from tests.two_ranks import one_of_two_ranks
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.data import Augmentation
from torchlethe.io import save_weights
from torchlethe.lightning_modules import Classifier, FineTune, SFRon

EPOCHS = 2


class KillAfter(Callback):
    """Die without any chance to clean up."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, *args: Any) -> None:
        """Count down."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(kind: str) -> tuple[LightningModule, Any, dict[str, Any]]:
    """Module, datamodule and trainer arguments of a run that is cut off in the middle of an epoch."""
    if kind == "classifier":
        module: LightningModule = Classifier(small_network(), 10, sgd(), cosine(EPOCHS), mixup=0.2)
        return module, digits(augmentation=Augmentation(crop=1), validation=0.1), {"max_epochs": EPOCHS}
    if kind == "fine_tune":
        module = FineTune(small_network(), 10, optimizer=sgd(0.01), lr_scheduler=cosine(EPOCHS))
        return module, forgetful_digits(augmentation=Augmentation(crop=1)), {"max_epochs": EPOCHS}
    if kind == "sfron_auto":
        module = SFRon(small_network(), 10, steps=24, forget_every=4, alpha="auto", auto_alpha_steps=8)
        return module, forgetful_digits(augmentation=Augmentation(crop=1), validation=0.1), {}
    module = SFRon(small_network(), 10, steps=30, forget_every=4, slow_beta=0.9, alpha=5.0)
    return module, forgetful_digits(augmentation=Augmentation(crop=1)), {}


def train(kind: str, folder: Path, kill_after: int | None = None, resume: bool = False) -> LightningModule:
    """Run from the start or from the newest checkpoint, with a checkpoint every seven batches."""
    module, datamodule, arguments = resumable(kind)
    callbacks: list[Callback] = [ModelCheckpoint(folder, "last", every_n_train_steps=7, enable_version_counter=False)]
    callbacks += [KillAfter(kill_after)] if kill_after else []
    trainer = quiet_trainer(
        callbacks=callbacks,
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        **arguments,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=folder / "last.ckpt" if resume else None)
    return module


def joined(kind: str, batch_size: int, folder: Path, **arguments: Any) -> None:
    """A short run of a network without BatchNorm; writes the weights and what was logged."""
    if kind == "classifier":
        module: LightningModule = Classifier(norm_free_network().double(), 10, sgd(), cosine(EPOCHS))
        datamodule: Any = digits(batch_size=batch_size, test_size=597, validation=120)
        limits = {"max_epochs": 1}
    elif kind == "sfron_auto":
        # a target that an untrained network does not start at, so that there is something to search for
        options: dict[str, Any] = {"steps": 12, "forget_every": 3, "auto_alpha_steps": 6, "auto_alpha_target": 2.4}
        module = SFRon(norm_free_network().double(), 10, alpha="auto", optimizer=sgd(0.02), **options)
        datamodule, limits = forgetful_digits(batch_size=batch_size, test_size=597), {}
    else:
        # clipped, masked and pulled, so that each of these is compared
        module = SFRon(norm_free_network().double(), 10, steps=12, forget_every=3, slow_beta=0.9, clip=0.5)
        datamodule, limits = forgetful_digits(batch_size=batch_size, test_size=597), {}
    trainer = quiet_trainer(precision="64-true", **limits, **arguments)
    trainer.fit(module, datamodule=datamodule)
    scores = trainer.test(module, datamodule=datamodule, verbose=False)[0]
    if trainer.is_global_zero:
        logged = {f"score.{name}": torch.as_tensor(value).double() for name, value in scores.items()}
        if isinstance(module, SFRon):
            logged["alpha"] = torch.tensor([module.update.alpha, *module.update.alpha_trials.values()]).double()
        save_weights(dict(module.network.state_dict()) | logged, folder / f"{kind}.safetensors")


if __name__ == "__main__":
    what, target = sys.argv[1], Path(sys.argv[2])
    if what == "resume":
        torch.set_num_threads(1)
        train(sys.argv[3], target, kill_after=int(sys.argv[4]))
    else:
        with one_of_two_ranks() as ranks:
            for kind in ("classifier", "sfron", "sfron_auto"):
                joined(kind, 30, target, **ranks())
