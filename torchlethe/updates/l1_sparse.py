"""L1-sparse: fine-tuning on the remaining data with an L1 penalty on the weights that falls over the run.

Source: Jia et al., NeurIPS 2023, https://arxiv.org/abs/2304.04934; official code
https://github.com/OPTML-Group/Unlearn-Sparse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.arguments import check_at_least
from torchlethe.data import Single
from torchlethe.functional.forget_losses import l1_norm, l1_strength
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory, cross_entropy, default_optimizer


class L1SparseUpdate(LossUpdate):
    """Cross-entropy descent on the remaining data plus a_e·‖θ‖₁.

    Args:
        optimizer: makes the optimizer from the parameters.
        alpha: weight a of the penalty in the first epoch, at least 0.
        no_l1_epochs: epochs at the end without penalty.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        The penalty is over all trainable weights, biases and BatchNorm's scales included, as coded. A plain loop calls
        ``set_length`` first.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        alpha: float = 5e-4,
        no_l1_epochs: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_at_least(0, alpha=alpha, no_l1_epochs=no_l1_epochs)
        self.alpha, self.no_l1_epochs = alpha, no_l1_epochs
        self.feed = Single("remain")
        self.parameters: list[nn.Parameter] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters."""
        self.prepared = False
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Refuse to start when the length of the run is not known."""
        self.required_length()
        return super().prepare(network, loaders)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the batch plus the penalty."""
        steps, steps_per_epoch = self.required_length()
        epochs = -(-steps // steps_per_epoch)
        strength = l1_strength(self.alpha, k // steps_per_epoch, epochs, self.no_l1_epochs)
        with self.batch_norm(network):
            loss = cross_entropy(network, batch)
        logs: dict[str, Tensor | float] = {"remain_loss": loss.detach(), "l1_strength": strength}
        if strength:
            norm = l1_norm(self.parameters)
            loss = loss + strength * norm
            logs["l1_norm"] = norm.detach()
        return loss, logs
