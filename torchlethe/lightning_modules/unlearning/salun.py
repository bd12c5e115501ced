"""SalUn: random labels, moving only the weights that matter to the forget set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import SalUnSoftUpdate, SalUnUpdate
from torchlethe.updates.salun import salun_optimizer


class SalUn(UnlearningModule):
    """Random labels with a hard gradient mask (Fan et al., ICLR 2024).

    The mask keeps the weights with the largest absolute gradient over the forget set at the original model. Defaults of
    https://github.com/OPTML-Group/Unlearn-Saliency for CIFAR-10 and 10 %, run for 10 epochs.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        mask_fraction: share of the weights that move, in [0, 1].
        strict_mask: hold the other weights exactly; without it weight decay and momentum move them, as in the official
            code before it was corrected.
        order: in each epoch a pass over the forget set, then one over the remaining data (``sequential``), or batches
            of both shuffled together (``joined``).
        labels: draw from ``all`` classes, the true one included, or from the ``other`` ones.
        redraw: new labels in each ``epoch``, or the same throughout (``once``).
        seed: seed of the labels; a label is a pure function of it, the pass and the sample's index.
        bn_mode: whose statistics BatchNorm uses and gathers: those of every batch (``train``), of none (``eval``), or
            of remaining batches only (``remain``); the last needs the order ``sequential``.

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
        optimizer: OptimizerCallable = salun_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        mask_fraction: float = 0.5,
        strict_mask: bool = True,
        order: Literal["sequential", "joined"] = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: Literal["train", "eval", "remain"] = "train",
    ) -> None:
        update = SalUnUpdate(
            optimizer,
            mask_fraction=mask_fraction,
            strict_mask=strict_mask,
            order=order,
            labels=labels,
            redraw=redraw,
            seed=seed,
            bn_mode=bn_mode,
        )
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)


class SalUnSoft(UnlearningModule):
    """Random labels with soft-thresholded changes (Fan et al., ICLR 2024).

    After step k of K the change since the original model shrinks by its r-th smallest absolute value, r =
    ⌊mask_ratio·(1 − k/K)·P⌋ of P weights. Two faults of the official code are corrected, see
    :class:`~torchlethe.updates.SalUnSoftUpdate`.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        mask_ratio: share of the weights that do not move at first, in [0, 1].
        order: in each epoch a pass over the forget set, then one over the remaining data (``sequential``), or batches
            of both shuffled together (``joined``).
        labels: draw from ``all`` classes, the true one included, or from the ``other`` ones.
        redraw: new labels in each ``epoch``, or the same throughout (``once``).
        seed: seed of the labels; a label is a pure function of it, the pass and the sample's index.
        bn_mode: whose statistics BatchNorm uses and gathers: those of every batch (``train``), of none (``eval``), or
            of remaining batches only (``remain``); the last needs the order ``sequential``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP two ranks with
        half the batch compute what one computes, but for BatchNorm in train mode. The original weights are held, and
        stored in the checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = salun_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        mask_ratio: float = 0.5,
        order: Literal["sequential", "joined"] = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: Literal["train", "eval", "remain"] = "train",
    ) -> None:
        update = SalUnSoftUpdate(
            optimizer, mask_ratio=mask_ratio, order=order, labels=labels, redraw=redraw, seed=seed, bn_mode=bn_mode
        )
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
