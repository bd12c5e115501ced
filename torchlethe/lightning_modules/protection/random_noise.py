"""Random sign noise as a LightningModule."""

from __future__ import annotations

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.random_noise import RandomNoiseProtector


class RandomNoise(ProtectionModule):
    """Add +ε or −ε to each pixel value at random: what a perturbation does that was not made for anything.

    Args:
        radius: ε in units of 1/255.
        seed: the signs are a function of (seed, index).

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP each rank protects its share of the images; nothing is exchanged. No network is needed.

    Example:
        >>> RandomNoise(radius=8).protection.bound()
        {'norm': 'inf', 'value': 8}
    """

    def __init__(
        self,
        radius: int = 8,
        seed: int = 0,
    ) -> None:
        protection = RandomNoiseProtector(
            radius=radius,
            seed=seed,
        )
        super().__init__(protection, cache=False)
