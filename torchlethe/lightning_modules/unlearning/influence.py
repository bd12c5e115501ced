"""InfluenceUnlearning: one Newton-like step away from the forget set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import InfluenceUpdate


class InfluenceUnlearning(UnlearningModule):
    """The baseline "IU" of the literature, and what it stands for.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        inverse: ``as_coded``, the published "WoodFisher" recursion, which is a first-order step; ``true_woodfisher``,
            what it is meant to compute, the inverse of the remaining data's damped empirical Fisher information;
            ``cg``, that of its damped Gauss-Newton matrix; ``kfac``, that of the Kronecker-factored approximation, with
            one pass over the data; ``none``, the difference of the two mean gradients itself.
        alpha: length of the step, to be tuned; for ``cg`` 1 is the Newton step.
        samples: remaining samples of the recursion, at most.
        n0: the recursion's constant.
        damping: added to the diagonal of the matrix, above 0.
        iterations: of conjugate gradients (``true_woodfisher`` and ``cg``), at most.
        batches: remaining batches for the matrix; None takes all, in every iteration.
        seed: of the labels that ``kfac`` draws from the network's predictions.

    Raises:
        ValueError: an argument is out of range.

    Note:
        The run has one step, which reads the roles forget and remain. Under DDP the edit is that of one process with
        the joined batches.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        inverse: Literal["as_coded", "true_woodfisher", "cg", "kfac", "none"] = "as_coded",
        alpha: float = 1.0,
        samples: int = 1002,
        n0: float = 1000.0,
        damping: float = 1e-2,
        iterations: int = 20,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        update = InfluenceUpdate(inverse, alpha, samples, n0, damping, iterations, batches, seed)
        super().__init__(network, num_classes, update, weights)
