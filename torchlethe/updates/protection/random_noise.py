"""Random sign noise: what a perturbation does that was not made for anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlethe.data import random_bits
from torchlethe.updates.protection.base import Protection
from torchlethe.updates.protection.settings import check_radius, described


class RandomNoiseProtector(Protection):
    """Add +ε or −ε to each pixel value at random; a sanity check, which must do almost nothing.

    Args:
        radius: ε in units of 1/255.
        seed: the signs are a function of (seed, index).

    Raises:
        ValueError: ``radius`` is out of range.

    >>> image = torch.full((2, 1, 2, 2), 100, dtype=torch.uint8)
    >>> changed = RandomNoiseProtector(8).protect(image, torch.tensor([0, 1]), torch.tensor([4, 5]))
    >>> (changed.int() - 100).abs().unique().tolist()
    [8]
    """

    def __init__(self, radius: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.radius: int = check_radius(radius)
        self.seed = seed

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        bits = random_bits(self.seed, 0, index, image[0].numel()).view(image.shape)
        sign = ((bits >> 31) * 2 - 1).to(torch.int16)
        return (image.to(torch.int16) + self.radius * sign).clamp_(0, 255).to(torch.uint8)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "seed")
