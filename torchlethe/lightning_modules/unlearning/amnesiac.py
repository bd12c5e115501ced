"""Amnesiac: take back the updates that forget samples took part in."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import AmnesiacUpdate


class Amnesiac(UnlearningModule):
    """Amnesiac unlearning (Graves et al., AAAI 2021): subtract logged weight changes.

    The original model must have been trained with the callback :class:`~torchlethe.callbacks.UpdateLog`. Usually a few
    epochs of :class:`~torchlethe.lightning_modules.FineTune` follow, which repair what the subtraction damaged.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        log: the folder that ``UpdateLog`` wrote.
        weights: file with the original model's weights, those at the end of the logged training.
        scale: share of the changes that is taken back, above 0; 1 is the method.

    Raises:
        ValueError: an argument is out of range, or the log is missing, unfinished, of other weights, or does not cover
            the forget set.

    Note:
        The run has one step; of the forget set it reads which samples it holds. Under DDP every rank reads the log.
    """

    compilable = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        log: str | Path,
        weights: str | Path | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(network, num_classes, AmnesiacUpdate(log, scale), weights)
