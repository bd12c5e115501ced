"""UNSIR: impair with learned noise, then repair."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import UNSIRUpdate
from torchlethe.updates.unsir import impair_optimizer, repair_optimizer


class UNSIR(UnlearningModule):
    """Forget whole classes by training on noise that maximises their loss, then repair (Tarun et al., 2023).

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer of the impair passes.
        repair: makes that of the repair passes.
        impair_epochs: passes over the chosen remaining samples with noise mixed in, at least 1.
        repair_epochs: passes without noise.
        per_class: remaining samples of each class that are used, at most.
        noise_steps: steps of Adam that learn the noise.
        noise_lr: its learning rate.
        penalty: weight of the noise's mean squared length.
        noise_batch: noise images of a class.
        noise_count: use the whole ``batch`` of them, or ``as_coded`` as many as an image has channels.
        repeats: how often each noise image is shown in an impair pass.
        seed: of the noise, its order and the choice of remaining samples.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range, the forget set is not made of whole classes, or the precision is fp16.

    Note:
        Manual optimization; the run ends by itself after all passes. Images of the forget set are not trained on, only
        their labels are looked at. Under DDP all ranks learn the same noise, and each shows its share.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = impair_optimizer,
        repair: OptimizerCallable = repair_optimizer,
        impair_epochs: int = 1,
        repair_epochs: int = 1,
        per_class: int = 1000,
        noise_steps: int = 40,
        noise_lr: float = 0.1,
        penalty: float = 0.1,
        noise_batch: int = 256,
        noise_count: Literal["batch", "as_coded"] = "batch",
        repeats: int = 1,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = UNSIRUpdate(
            optimizer=optimizer,
            repair=repair,
            impair_epochs=impair_epochs,
            repair_epochs=repair_epochs,
            per_class=per_class,
            noise_steps=noise_steps,
            noise_lr=noise_lr,
            penalty=penalty,
            noise_batch=noise_batch,
            noise_count=noise_count,
            repeats=repeats,
            seed=seed,
            bn_mode=bn_mode,
        )
        super().__init__(network, num_classes, update, weights)
