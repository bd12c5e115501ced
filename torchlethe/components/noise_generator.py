"""Networks that make a perturbation from a random input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1)
    return nn.Sequential(convolution, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _block(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.InstanceNorm2d(width, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ResidualGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two enlargements: an image of the same size in [−1, 1].

    After Johnson et al. 2016, as in GAP, smaller. Instance normalisation: no statistics across images or ranks.

    Args:
        shape: (C, H, W), each side at least 8.
        width: channels after the first convolution.
        blocks: residual blocks.
    """

    def __init__(self, shape: Sequence[int], width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        channels, self.size = shape[0], tuple(shape[1:])
        if min(self.size) < 8:
            raise ValueError(f"the images are {self.size[0]}×{self.size[1]} pixels, a generator needs at least 8×8.")
        self.encode = nn.Sequential(
            _block(channels, width), _block(width, 2 * width, 2), _block(2 * width, 4 * width, 2)
        )
        self.blocks = nn.Sequential(*(_Residual(4 * width) for _ in range(blocks)))
        self.middle, self.late = _block(4 * width, 2 * width), _block(2 * width, width)
        self.last = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) from random images of that size."""
        x = self.blocks(self.encode(z))
        x = self.middle(F.interpolate(x, scale_factor=2.0))
        x = self.late(F.interpolate(x, size=self.size))
        return self.last(x).tanh()


class LatentGenerator(nn.Module):
    """From a vector to an image in [−1, 1]: a linear layer, then enlargements by two with convolutions.

    Args:
        shape: (C, H, W).
        latent: length of the vector.
        width: channels of the widest layer.
    """

    def __init__(self, shape: Sequence[int], latent: int = 10, width: int = 64) -> None:
        super().__init__()
        channels, self.size = shape[0], tuple(shape[1:])
        self.latent, self.width = latent, width
        self.first = nn.Linear(latent, width * 16)
        steps = max(1, (max(self.size) // 4 - 1).bit_length())
        self.stages = nn.ModuleList(_block(max(width >> i, 16), max(width >> (i + 1), 16)) for i in range(steps))
        self.last = nn.Conv2d(max(width >> steps, 16), channels, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) from vectors (B, latent)."""
        x = self.first(z).view(len(z), self.width, 4, 4)
        for stage in self.stages:
            x = stage(F.interpolate(x, scale_factor=2.0))
        return F.interpolate(self.last(x), size=self.size, mode="bilinear").tanh()


def seeded(build: type[nn.Module], seed: int, *args: object) -> nn.Module:
    """Build a network from a seed of its own; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(*args)
