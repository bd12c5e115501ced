"""FineTune: keep training on the remaining data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import FineTuneUpdate
from torchlethe.updates.base import default_optimizer


class FineTune(UnlearningModule):
    """Fine-tune a trained classifier on the remaining data, without touching the forget set.

    Args:
        network: the classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP as
        :class:`~torchlethe.lightning_modules.Classifier`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__(network, num_classes, FineTuneUpdate(optimizer, bn_mode), weights, lr_scheduler, lr_interval)
