"""Hypocritical perturbations as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchlethe.io import load_weights
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.hypocritical import HypocriticalProtector


class Hypocritical(ProtectionModule):
    """Minimise CE(h(x + δ), y) for one trained network, from the clean image, so that images look even easier.

    Tao et al., "Better Safe Than Sorry: Preventing Delusive Adversaries with Adversarial Training", NeurIPS 2021.

    Args:
        network: a trained classifier, maps images in [0, 1] to logits.
        weights: file with its weights.
        radius: ε in units of 1/255.
        step: α in units of 1/255.
        steps: number of steps.

    Raises:
        FileNotFoundError: ``weights`` does not exist.
        ValueError: an argument is out of range, or the weights do not fit.

    Note:
        Under DDP each rank protects its share of the images; nothing is exchanged. The network is used in eval mode,
        images are kept in float32 units of 1/255. Precision: 32-true, 64-true or bf16-mixed.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None = None,
        radius: int = 8,
        step: float = 0.8,
        steps: int = 100,
    ) -> None:
        if weights is not None:
            load_weights(network, weights)
        protection = HypocriticalProtector(
            network,
            radius=radius,
            step=step,
            steps=steps,
        )
        super().__init__(protection, cache=False)
