"""Cos-UAP: feature gathering on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import feature_gathering_loss, targeted_loss
from torchlethe.updates.attacks.base import LossAttack, OptimizerFactory, default_optimizer, warn_at_zero


class CosineLogits(LossAttack):
    """Minimise the mean cosine of the logits of x + v and x; data-free when given jigsaw images.

    Zhang, Benz, Karjauv, Kweon, "Data-free Universal Adversarial Perturbation and Black-box Attack", ICCV 2021.

    Args:
        target: class that all images shall get, by cross-entropy alone; None for an untargeted attack.
        optimizer: makes the optimizer.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(self, target: int | None = None, optimizer: OptimizerFactory = default_optimizer) -> None:
        super().__init__(optimizer)
        self.target = target

    def prepare(self, noise: UniversalNoise) -> None:
        """Warn where an untargeted attack starts without a gradient."""
        if self.target is None:
            warn_at_zero(noise)

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cosine, or the cross-entropy with the target."""
        logits = network(noise(batch["image"])).logits
        if self.target is not None:
            return targeted_loss(logits, self.target), {}
        return feature_gathering_loss(logits, batch["clean_logits"]), {}
