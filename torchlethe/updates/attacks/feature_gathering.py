"""FG-UAP: push the feature of x + v away, in angle, from the feature of x, for all x at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import feature_gathering_loss, targeted_loss
from torchlethe.updates.attacks.base import LossAttack, OptimizerFactory, default_optimizer, warn_at_zero


class FeatureGathering(LossAttack):
    """Minimise mean cos(φ(x+v), φ(x)), plus λ·CE(logits(x+v), t) where a target is given; labels are never read.

    Ye, Cheng, Huang, "FG-UAP: Feature-Gathering Universal Adversarial Perturbation", 2022, arXiv 2209.13113.

    Args:
        target: class t that all images shall get, None for an untargeted attack.
        lam: λ, weight of the cross-entropy.
        optimizer: makes the optimizer.

    Raises:
        ValueError: ``lam`` is negative.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(
        self, target: int | None = None, lam: float = 0.1, optimizer: OptimizerFactory = default_optimizer
    ) -> None:
        check_at_least(0, lam=lam)
        super().__init__(optimizer)
        self.target, self.lam = target, lam

    def prepare(self, noise: UniversalNoise) -> None:
        """Warn where an untargeted attack starts without a gradient."""
        if self.target is None:
            warn_at_zero(noise)

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cosine, and the targeted term."""
        out = network(noise(batch["image"]))
        if out.features is None:
            raise ValueError("the network tells no features: build the SplitNetwork with a feature_layer.")
        cosine = feature_gathering_loss(out.features, batch["clean_features"])
        if self.target is None:
            return cosine, {"cosine": cosine.detach()}
        entropy = targeted_loss(out.logits, self.target)
        return cosine + self.lam * entropy, {"cosine": cosine.detach(), "cross_entropy": entropy.detach()}
