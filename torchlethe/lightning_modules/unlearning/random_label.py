"""RandomLabel: train the forget set on random labels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import RandomLabelUpdate
from torchlethe.updates.base import default_optimizer


class RandomLabel(UnlearningModule):
    """Train the forget set on random labels and the remaining data on its own.

    Three published forms: by default that of https://github.com/OPTML-Group/Unlearn-Saliency for CIFAR-10; with
    ``order="joined", labels="other", redraw="once"`` that of
    https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry (learning rate 0.003, 10 epochs, cosine) and, with
    Adam 1e-4 for 3 epochs, the "amnesiac" one of https://github.com/vikram2000b/bad-teaching-unlearning.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
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
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        order: Literal["sequential", "joined"] = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: Literal["train", "eval", "remain"] = "train",
    ) -> None:
        update = RandomLabelUpdate(optimizer, order=order, labels=labels, redraw=redraw, seed=seed, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
