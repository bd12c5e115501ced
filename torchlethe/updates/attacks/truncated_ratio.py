"""TRM-UAP: large positive and small negative activations in the first layers, on images without content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from torchlethe.arguments import check_within
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import truncated_ratio_loss
from torchlethe.updates.attacks.base import OptimizerFactory
from torchlethe.updates.attacks.layer_activations import LayerAttack, gd_optimizer, without_normalisation


class TruncatedRatio(LayerAttack):
    """Truncated ratio maximisation on v + prior images, which the data bring (jigsaw or Gaussian proxies).

    Liu, Zhong, Zhang, Qin, Deng, "TRM-UAP: Enhancing the Transferability of Data-Free Universal Adversarial
    Perturbation via Truncated Ratio Maximization", ICCV 2023; github.com/RandolphCarter0/TRMUAP.

    Args:
        p_rate: share of the layers, from the first, whose positive activations shall grow.
        n_rate: share whose negative activations shall shrink; of a positive share at least one layer counts.
        lam: λ, weight of the negative part.
        layers: see :class:`LayerAttack`.
        raw_input: see :class:`LayerAttack`.
        optimizer: makes the optimizer.

    Raises:
        ValueError: a share lies outside [0, 1], or ``p_rate`` is 0.
    """

    def __init__(
        self,
        p_rate: float = 0.8,
        n_rate: float = 0.7,
        lam: float = 1.0,
        layers: Sequence[str] | None = None,
        raw_input: bool = False,
        optimizer: OptimizerFactory = gd_optimizer,
    ) -> None:
        check_within(0, 1, p_rate=p_rate, n_rate=n_rate)
        if not p_rate:
            raise ValueError("p_rate is 0, at least one layer must count.")
        super().__init__(layers, raw_input, optimizer)
        self.p_rate, self.n_rate, self.lam = p_rate, n_rate, lam

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on v + x, not clamped, as the official code has it."""
        moved = batch["image"].to(noise.v.dtype) + noise.v
        with without_normalisation(network.network) if self.raw_input else nullcontext():
            activations = network(moved).activations
        positive, negative = (max(int(rate * len(activations)), int(rate > 0)) for rate in (self.p_rate, self.n_rate))
        return truncated_ratio_loss(activations, positive, negative, self.lam), {}
