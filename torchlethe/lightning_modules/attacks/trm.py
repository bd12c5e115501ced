"""TRM-UAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.layer_activations import gd_optimizer
from torchlethe.updates.attacks.truncated_ratio import TruncatedRatio


class TRMUAP(UniversalPerturbation):
    """TRM-UAP: truncated ratio of positive to negative activations, on images without content.

    Liu et al., "TRM-UAP: Enhancing the Transferability of Data-Free Universal Adversarial Perturbation via Truncated
    Ratio Maximization", ICCV 2023; code RandolphCarter0/TRMUAP. Give it a :class:`~torchlethe.datamodules.ProxyImages`
    as data; the published curriculum of easier to harder proxies is left out.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        p_rate: share of the layers whose positive activations shall grow.
        n_rate: share whose negative activations shall shrink.
        lam: λ, weight of the negative part.
        layers: dotted names of the layers; all convolutions by default.
        raw_input: whether the network's normalisation is left out.
        optimizer: makes the optimizer of v; Adam with rate 0.1 by default.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        p_rate: float = 0.8,
        n_rate: float = 0.7,
        lam: float = 1.0,
        layers: Sequence[str] | None = None,
        raw_input: bool = False,
        optimizer: OptimizerCallable = gd_optimizer,
        **kwargs: Any,
    ) -> None:
        attack = TruncatedRatio(p_rate, n_rate, lam, layers, raw_input, optimizer)
        super().__init__(attack, network, num_classes, **kwargs)
