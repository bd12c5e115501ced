"""CFk and EUk: train the last blocks of a network on the remaining data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import CFkUpdate, EUkUpdate
from torchlethe.updates.base import default_optimizer
from torchlethe.updates.last_blocks import LastBlocksUpdate


class CFk(UnlearningModule):
    """CF-k: fine-tune the last k blocks and the head on the remaining data (Goel et al., 2022).

    Everything before them is frozen, BatchNorm statistics included; run for 10 epochs. The forget set is not read.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        blocks: number k of blocks in front of the head that are trained with it, see
            :func:`torchlethe.models.blocks.last_blocks`; or the names of the submodules to train.
        bn_mode: whether BatchNorm in the trained blocks uses (and updates) its statistics: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP two ranks with
        half the batch compute what one computes, but for BatchNorm in train mode.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        blocks: int | list[str] = 1,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = CFkUpdate(optimizer, blocks=blocks, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)

    def setup(self, stage: str) -> None:
        """Freeze before the Trainer wraps the network: DDP would wait for gradients of frozen weights."""
        super().setup(stage)
        if stage == "fit" and isinstance(self.update, LastBlocksUpdate):
            self.update.freeze(self.network)


class EUk(UnlearningModule):
    """EU-k: initialise the last k blocks and the head anew and train them on the remaining data (Goel et al., 2022).

    Everything before them is frozen, BatchNorm statistics included; run for as many epochs as the original model and at
    its learning rate. The forget set is not read.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        blocks: number k of blocks in front of the head that are trained with it, see
            :func:`torchlethe.models.blocks.last_blocks`; or the names of the submodules to train.
        seed: seed of the initialisation, the same on all ranks and devices.
        bn_mode: whether BatchNorm in the trained blocks uses (and updates) its statistics: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP two ranks with
        half the batch compute what one computes, but for BatchNorm in train mode.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        blocks: int | list[str] = 1,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = EUkUpdate(optimizer, blocks=blocks, seed=seed, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)

    def setup(self, stage: str) -> None:
        """Freeze before the Trainer wraps the network: DDP would wait for gradients of frozen weights."""
        super().setup(stage)
        if stage == "fit" and isinstance(self.update, LastBlocksUpdate):
            self.update.freeze(self.network)
