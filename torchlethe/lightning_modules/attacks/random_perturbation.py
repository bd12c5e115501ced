"""Random noise, the reference of every attack."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchlethe.components.universal_noise import Init
from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.random_noise import RandomNoise


class RandomPerturbation(UniversalPerturbation):
    """v = ±ξ with random signs (or uniform noise): what a perturbation of this size does without design.

    Nothing is learned, so ``test`` and ``predict`` need no ``fit``.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        init: ``sign`` for ±ξ, ``uniform`` for ±ξ/2.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(self, network: nn.Module, num_classes: int, init: Init = "sign", **kwargs: Any) -> None:
        super().__init__(RandomNoise(), network, num_classes, init=init, **kwargs)
