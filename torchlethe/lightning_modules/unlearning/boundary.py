"""BoundaryShrink and BoundaryExpand: move the decision boundary across the forget samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import BoundaryExpandUpdate, BoundaryShrinkUpdate
from torchlethe.updates.boundary import boundary_optimizer


class BoundaryShrink(UnlearningModule):
    """Train forget samples towards the nearest other class (Chen et al., CVPR 2023); reads the forget set only.

    The nearest other class is the original network's prediction after one signed-gradient step in pixels.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters; the learning rate has to be tuned.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        epsilon: size of the step in pixel units of [0, 1], above 0.
        skip_failed: leave out samples whose prediction the step did not change; the published code trains them on
            their own label.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization. ``boundary_crossed`` in the log is the share of samples whose prediction changed. The
        original is a frozen copy outside the checkpoint, made anew from the original weights by a resumed run.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = boundary_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        epsilon: float = 0.1,
        skip_failed: bool = False,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = BoundaryShrinkUpdate(optimizer, epsilon, skip_failed, bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)


class BoundaryExpand(UnlearningModule):
    """Train forget samples into an extra class that is then dropped (Chen et al., CVPR 2023); reads these only.

    The network keeps its number of outputs, in checkpoints too: the extra row lives beside it.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`;
            it must end in a linear layer.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters; the learning rate has to be tuned.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        seed: of the extra row's initial weights.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range, or the network's classifier is not found.

    Note:
        Automatic optimization. Under DDP the extra row's gradient is averaged over ranks like the others.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = boundary_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = BoundaryExpandUpdate(optimizer, seed, bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
