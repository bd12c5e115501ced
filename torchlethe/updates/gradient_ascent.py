"""Methods that raise the loss on the forget set: gradient ascent (NegGrad), NegGrad+ and NPO.

Sources: gradient ascent as coded in https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry (the defaults) and
https://github.com/OPTML-Group/Unlearn-Saliency; NegGrad+ from Kurmanji et al., NeurIPS 2023
(https://github.com/meghdadk/SCRUB), defaults of https://github.com/xcadet/deepunlearn; NPO from Zhang et al., 2024,
https://arxiv.org/abs/2404.05868, carried over to classifiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_above, check_at_least, check_within
from torchlethe.components.originals import frozen_copy
from torchlethe.data import Interleaved, Single, model_input
from torchlethe.functional.forget_losses import negative_preference
from torchlethe.updates.base import (
    BatchNormMode,
    LossUpdate,
    OptimizerFactory,
    cross_entropy,
    default_optimizer,
    logits_and_labels,
)


def ascent_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the learning rate 1e-4 that both official codes use for gradient ascent."""
    return SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4)


def plain_sgd(parameters: Iterable[Any]) -> Optimizer:
    """SGD with learning rate 0.01, without momentum or weight decay."""
    return SGD(parameters, lr=0.01)


class GradientAscentUpdate(LossUpdate):
    """Ascent on the cross-entropy of the forget set, which reads nothing else.

    Args:
        optimizer: makes the optimizer from the parameters.
        bn_mode: ``eval``: BatchNorm keeps its running statistics; ``train``: it uses (and gathers) those of the forget
            batches, and the network collapses sooner.
        clip: largest norm of the gradient; ``inf`` never clips.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, optimizer: OptimizerFactory = ascent_optimizer, bn_mode: BatchNormMode = "eval", clip: float = 0.1
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_above(0, clip=clip)
        self.clip = clip
        self.feed = Single("forget")
        self.parameters: list[nn.Parameter] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters."""
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        return super().configure(network)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Minus the mean cross-entropy of the batch."""
        with self.batch_norm(network, "forget"):
            loss = cross_entropy(network, batch)
        return -loss, {"forget_loss": loss.detach()}

    def before_optimizer_step(self) -> None:
        """Clip."""
        if self.clip < float("inf"):
            nn.utils.clip_grad_norm_(self.parameters, self.clip)


class NegGradPlusUpdate(LossUpdate):
    """Descent on a remaining batch and ascent on a forget batch in each step: a·CE(D_r) − (1 − a)·CE(D_f).

    An epoch is a pass over the remaining data, the forget set is cycled.

    Args:
        optimizer: makes the optimizer from the parameters.
        alpha: share a of the remaining data, in [0, 1].
        bn_mode: see :class:`~torchlethe.updates.LossUpdate`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, optimizer: OptimizerFactory = plain_sgd, alpha: float = 0.95, bn_mode: BatchNormMode = "train"
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_within(0, 1, alpha=alpha)
        self.alpha = alpha
        self.feed = Interleaved(every=1)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted difference of both mean cross-entropies."""
        with self.batch_norm(network, "remain"):
            remain = cross_entropy(network, batch["remain"])
        with self.batch_norm(network, "forget"):
            forget = cross_entropy(network, batch["forget"])
        logs: dict[str, Tensor | float] = {"forget_loss": forget.detach(), "remain_loss": remain.detach()}
        return self.alpha * remain - (1 - self.alpha) * forget, logs


class NPOUpdate(LossUpdate):
    """Negative preference on a forget batch plus cross-entropy on a remaining batch in each step.

    Args:
        optimizer: makes the optimizer from the parameters.
        beta: inverse temperature of :func:`~torchlethe.functional.forget_losses.negative_preference`, above 0.
        remain_weight: weight of the cross-entropy on the remaining data, at least 0.
        bn_mode: see :class:`~torchlethe.updates.LossUpdate`; the original model is always in eval mode.

    Raises:
        ValueError: an argument is out of range.

    Note:
        A frozen copy of the original model is kept, also in the state, so that a resumed run compares with the same.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        beta: float = 0.1,
        remain_weight: float = 1.0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_above(0, beta=beta)
        check_at_least(0, remain_weight=remain_weight)
        self.beta, self.remain_weight = beta, remain_weight
        self.feed = Interleaved(every=1)
        self.original: nn.Module | None = None

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer; forgets an earlier run's original model."""
        self.prepared = False
        self.original = frozen_copy(network)
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Keep a copy of the original model."""
        self._original().load_state_dict(network.state_dict())
        return super().prepare(network, loaders)

    def _original(self) -> nn.Module:
        if self.original is None:
            raise RuntimeError("NPOUpdate was used before configure(network) and prepare(network, loaders).")
        return self.original

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The sum of both losses."""
        with self.batch_norm(network, "remain"):
            remain = cross_entropy(network, batch["remain"])
        forget = model_input(batch["forget"])
        with self.batch_norm(network, "forget"):
            logits, labels = logits_and_labels(network, forget)
        with torch.no_grad():
            reference, _ = logits_and_labels(self._original(), forget)
        losses = F.cross_entropy(logits, labels, reduction="none")
        preference = negative_preference(-losses, -F.cross_entropy(reference, labels, reduction="none"), self.beta)
        logs: dict[str, Tensor | float] = {
            "forget_loss": losses.detach().mean(),
            "remain_loss": remain.detach(),
            "npo_loss": preference.detach(),
        }
        return preference + self.remain_weight * remain, logs

    def state_dict(self) -> dict[str, Any]:
        """The weights of the original model."""
        return super().state_dict() | {"original": self._original().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._original().load_state_dict(state["original"])
