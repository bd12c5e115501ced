"""SSD, LFSSD and ASSD: dampen the weights that matter to the forget set."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import SSDUpdate


class SSD(UnlearningModule):
    r"""Selective synaptic dampening (Foster et al., AAAI 2024): one shot, no training.

    Weights whose importance to the forget set exceeds ``alpha`` times that to the whole training set are multiplied by
    :math:`\min(\lambda\, i_D / i_f, 1)`. Importances are squared gradients in eval mode, one pass over each set.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        alpha: threshold, at least 0; smaller values dampen more weights.
        lam: strength of the dampening, at least 0; smaller values dampen more.
        per_sample: square the gradients of single samples, so that batch size and order do not matter; the published
            form squares those of batch means.
        chunk_size: samples whose gradients are held at once with ``per_sample``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        The run has one step, which reads the roles forget and train. Under DDP importances are those of one process
        with the joined batches.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        alpha: float = 10.0,
        lam: float = 1.0,
        per_sample: bool = False,
        chunk_size: int = 64,
    ) -> None:
        update = SSDUpdate(alpha, lam, "fisher", per_sample, chunk_size)
        super().__init__(network, num_classes, update, weights)


class LFSSD(UnlearningModule):
    """Loss-free SSD: the importance is the gradient of the logits' squared length, so the labels do not matter.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        alpha: threshold, at least 0.
        lam: strength of the dampening, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Note:
        As :class:`~torchlethe.lightning_modules.SSD`.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        alpha: float = 10.0,
        lam: float = 1.0,
    ) -> None:
        super().__init__(network, num_classes, SSDUpdate(alpha, lam, "output_norm"), weights)


class ASSD(UnlearningModule):
    """Adaptive SSD: the threshold is a percentile of the importance ratios that follows from the forget set's share.

    The level is 100 - ln(1 + 100 · N_f / N), so there is no alpha to tune.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        lam: strength of the dampening, at least 0.
        per_sample: as for :class:`~torchlethe.lightning_modules.SSD`.
        chunk_size: samples whose gradients are held at once with ``per_sample``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        As :class:`~torchlethe.lightning_modules.SSD`.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        lam: float = 1.0,
        per_sample: bool = False,
        chunk_size: int = 64,
    ) -> None:
        update = SSDUpdate("adaptive", lam, "fisher", per_sample, chunk_size)
        super().__init__(network, num_classes, update, weights)
