"""Fine-tuning on the remaining data: the simplest baseline, hoping that the forget set fades."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchlethe.data import Single
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory, cross_entropy, default_optimizer


class FineTuneUpdate(LossUpdate):
    """Cross-entropy descent on the remaining data.

    Args:
        optimizer: makes the optimizer from the parameters.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.
    """

    def __init__(self, optimizer: OptimizerFactory = default_optimizer, bn_mode: BatchNormMode = "train") -> None:
        super().__init__(optimizer, bn_mode)
        self.feed = Single("remain")

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the batch."""
        with self.batch_norm(network):
            loss = cross_entropy(network, batch)
        return loss, {"remain_loss": loss.detach()}
