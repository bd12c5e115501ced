"""Methods that raise the loss on the forget set: GradientAscent (NegGrad), NegGradPlus and NPO."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import GradientAscentUpdate, NegGradPlusUpdate, NPOUpdate
from torchlethe.updates.base import default_optimizer
from torchlethe.updates.gradient_ascent import ascent_optimizer, plain_sgd


class GradientAscent(UnlearningModule):
    """Ascend the loss on the forget set, also called NegGrad; the remaining data is not read.

    The defaults are those of https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry, run for 9 epochs;
    https://github.com/OPTML-Group/Unlearn-Saliency has ``bn_mode="train"``, ``clip=inf`` and 5 epochs.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        clip: largest norm of the gradient; ``inf`` never clips.
        bn_mode: ``eval``: BatchNorm keeps its running statistics; ``train``: it uses (and gathers) those of the forget
            batches, and the network collapses sooner.

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
        optimizer: OptimizerCallable = ascent_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        clip: float = 0.1,
        bn_mode: Literal["train", "eval"] = "eval",
    ) -> None:
        update = GradientAscentUpdate(optimizer, clip=clip, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)


class NegGradPlus(UnlearningModule):
    """Descend on a remaining batch and ascend on a forget batch in each step (Kurmanji et al., NeurIPS 2023).

    The loss is a·CE(D_r) − (1 − a)·CE(D_f); an epoch is a pass over the remaining data. Defaults of
    https://github.com/xcadet/deepunlearn, run for 10 epochs. The share a has to be searched for each network.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        alpha: share a of the remaining data, in [0, 1].
        bn_mode: whose statistics BatchNorm uses and gathers: those of every batch (``train``), of none (``eval``), or
            of remaining batches only (``remain``).

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
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        alpha: float = 0.95,
        bn_mode: Literal["train", "eval", "remain"] = "train",
    ) -> None:
        update = NegGradPlusUpdate(optimizer, alpha=alpha, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)


class NPO(UnlearningModule):
    """Negative preference optimisation (Zhang et al., 2024), carried over from language models to classifiers.

    Each step minimises 2/β · mean log(1 + (p/p₀)^β) of the true labels of a forget batch, p₀ being the original model's
    probability, plus the cross-entropy of a remaining batch. The push on a sample fades as it is forgotten.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        beta: inverse temperature β, above 0; towards 0 it is gradient ascent.
        remain_weight: weight of the cross-entropy on the remaining data, at least 0.
        bn_mode: whose statistics BatchNorm uses and gathers: those of every batch (``train``), of none (``eval``), or
            of remaining batches only (``remain``).

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP two ranks with
        half the batch compute what one computes, but for BatchNorm in train mode. A frozen copy of the original model
        is held, and stored in the checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        beta: float = 0.1,
        remain_weight: float = 1.0,
        bn_mode: Literal["train", "eval", "remain"] = "train",
    ) -> None:
        update = NPOUpdate(optimizer, beta=beta, remain_weight=remain_weight, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
