"""FisherForgetting: noise where the remaining data does not mind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import FisherForgettingUpdate


class FisherForgetting(UnlearningModule):
    """Add noise to every weight, the larger the less the remaining data depends on it (Golatkar et al., CVPR 2020).

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        variant: ``fisher_new``, Fisher information under the network's own predictions; ``fisher``, the older empirical
            one of single samples.
        alpha: strength of the noise, at least 0, to be tuned.
        batch_size: samples whose gradients are averaged before they are squared (``fisher_new``).
        head_rule: what counts as the last layer: the ``identified`` classifier, or ``as_coded`` every parameter with a
            dimension as large as the number of classes.
        reset_classes: rows of the last layer for classes without remaining samples start from N(0, 1e-4).
        seed: the noise is a function of it.
        chunk_size: gradients held at once: of samples (``fisher``) or of classes (``fisher_new``).

    Raises:
        ValueError: an argument is out of range, or the network's classifier is not found.

    Note:
        The run has one step and reads the remaining data only. Under DDP all ranks add the same noise.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        variant: Literal["fisher_new", "fisher"] = "fisher_new",
        alpha: float = 1e-6,
        batch_size: int = 32,
        head_rule: Literal["identified", "as_coded"] = "identified",
        reset_classes: bool = True,
        seed: int = 0,
        chunk_size: int = 16,
    ) -> None:
        update = FisherForgettingUpdate(variant, alpha, batch_size, head_rule, reset_classes, seed, chunk_size)
        super().__init__(network, num_classes, update, weights)
