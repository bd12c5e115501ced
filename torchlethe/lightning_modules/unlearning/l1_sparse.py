"""L1Sparse: fine-tune towards a sparse network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import L1SparseUpdate
from torchlethe.updates.base import default_optimizer


class L1Sparse(UnlearningModule):
    """Fine-tune on the remaining data with an L1 penalty that falls over the run (Jia et al., NeurIPS 2023).

    In epoch e of E the penalty is a·(1 − e/(E − E₀))·‖θ‖₁, in the last E₀ epochs 0, over all weights, as coded in
    https://github.com/OPTML-Group/Unlearn-Sparse; run for 10 epochs. The forget set is not read.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        alpha: weight a of the penalty in the first epoch, at least 0.
        no_l1_epochs: number E₀ of epochs at the end without penalty.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. The Trainer needs
        ``max_epochs``. Under DDP two ranks with half the batch compute what one computes, but for BatchNorm in train
        mode.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        alpha: float = 5e-4,
        no_l1_epochs: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = L1SparseUpdate(optimizer, alpha=alpha, no_l1_epochs=no_l1_epochs, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
