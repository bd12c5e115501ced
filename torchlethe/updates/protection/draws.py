"""Random starts, crops and flips as functions of a seed and the images' indices."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlethe.data import random_bits
from torchlethe.functional.sign_descent import crop_and_flip


def uniform_noise(seed: int, index: Tensor, shape: tuple[int, ...], radius: float) -> Tensor:
    """Uniform noise in ±radius, (B, *shape) float32, a function of (seed, index)."""
    bits = random_bits(seed, 0, index, torch.Size(shape).numel())
    return (((bits >> 8).float() + 0.5) * 2**-23 - 1).mul_(radius).view(len(index), *shape)


def random_crops(image: Tensor, index: Tensor, seed: int, crop: int, flip: bool) -> Tensor:
    """Random shifts and mirror images, a function of (seed, index); see :func:`crop_and_flip`."""
    bits = random_bits(seed, 0, index, 3)
    mirrored = bits[:, 2] >= 1 << 31 if flip else torch.zeros_like(bits[:, 2], dtype=torch.bool)
    return crop_and_flip(image, bits[:, :2] % (2 * crop + 1) - crop, mirrored)
