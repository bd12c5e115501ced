"""Hypocritical perturbations: images that a trained network finds even easier."""

from __future__ import annotations

from torch import nn

from torchlethe.updates.protection.sign_descent import CrossEntropyProtector


class HypocriticalProtector(CrossEntropyProtector):
    """Minimise CE(h(x + δ), y) for one trained network, from the clean image.

    Tao et al., "Better Safe Than Sorry: Preventing Delusive Adversaries with Adversarial Training", NeurIPS 2021.

    Args:
        network: a trained classifier, maps images in [0, 1] to logits.
        radius: ε in units of 1/255.
        step: α in units of 1/255.
        steps: number of steps.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, network: nn.Module, radius: int = 8, step: float = 0.8, steps: int = 100) -> None:
        super().__init__(network, radius, step, steps)
