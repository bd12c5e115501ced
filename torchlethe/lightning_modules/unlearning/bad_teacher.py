"""BadTeacher: learn ignorance about the forget set from a network that knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import BadTeacherUpdate
from torchlethe.updates.bad_teacher import bad_teacher_optimizer


class BadTeacher(UnlearningModule):
    """Distil two teachers (Chundawat et al., AAAI 2023): an ignorant one on the forget set, the original elsewhere.

    Samples of both sets are shuffled together. The defaults are the official ones, for one epoch.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        temperature: of all three softmaxes, above 0.
        remain_share: random share of the remaining data that is used, in (0, 1].
        seed: of the ignorant teacher's weights and of the share.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.
        mean: what the divergence is a mean over: ``elements``, samples and classes, as in the official code; or
            ``samples``, K times larger, as in NatMU's version of the method.
        cache_teacher: ask both teachers once for each sample in place of once a step; the same numbers, for training
            without augmentation, else refused. It pays from the second epoch on.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Both teachers are frozen
        and outside the checkpoint: a resumed run makes them anew from the original weights and the seed.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = bad_teacher_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        temperature: float = 1.0,
        remain_share: float = 0.3,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
        mean: Literal["elements", "samples"] = "elements",
        cache_teacher: bool = False,
    ) -> None:
        update = BadTeacherUpdate(optimizer, temperature, remain_share, seed, bn_mode, mean, cache_teacher)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
