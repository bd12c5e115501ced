"""MSG, CT and CFW: disturb the convolutions once, then repair on the remaining data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import CFWUpdate, CTUpdate, MSGUpdate
from torchlethe.updates.base import default_optimizer


class MSG(UnlearningModule):
    """Draw anew the convolution weights on which both sets agree most; fine-tune with the others held back.

    From the unlearning challenge of NeurIPS 2023, as in the benchmark of Cadet et al., 2024
    (https://arxiv.org/abs/2410.01276). Both sets are read for one gradient, then only the remaining data.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        fraction: share of each kernel that is drawn anew, in [0, 1].
        kept_gradient: factor on the gradients of the kernels' other weights, at least 0.
        remain_batches: remaining batches whose gradient is measured; None takes all.
        seed: of the new weights.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range, or the network has no convolution.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP all ranks draw
        the same weights, chosen by gradients over all ranks.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        fraction: float = 0.3,
        kept_gradient: float = 0.1,
        remain_batches: int | None = None,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = MSGUpdate(optimizer, fraction, kept_gradient, remain_batches, seed, bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)


class CT(UnlearningModule):
    """Transpose the kernels of all convolutions, then fine-tune on the remaining data; the forget set is not read.

    From the unlearning challenge of NeurIPS 2023, as in the benchmark of Cadet et al., 2024
    (https://arxiv.org/abs/2410.01276).

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: the network has no kernel that can be transposed.

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
        super().__init__(network, num_classes, CTUpdate(optimizer, bn_mode), weights, lr_scheduler, lr_interval)


class CFW(UnlearningModule):
    """Add noise to all convolutions, fine-tune, add weaker noise before the last epoch; the forget set is not read.

    From the unlearning challenge of NeurIPS 2023, as in the benchmark of Cadet et al., 2024
    (https://arxiv.org/abs/2410.01276).

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        noise: standard deviation of the first noise, at least 0; 0.6 suits the challenge's network, tune it.
        last_noise: that of the noise before the last epoch, at least 0.
        seed: of both noises.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range, or the network has no convolution.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer, whose ``max_epochs`` must
        be set. Under DDP all ranks add the same noise.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        noise: float = 0.6,
        last_noise: float = 0.005,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        update = CFWUpdate(optimizer, noise, last_noise, seed, bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
