"""A convolutional autoencoder from images to perturbations of the same size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.checks import check_count


class Autoencoder(nn.Module):
    """Two strided convolutions down, two back up with the maps of the way down beside them, tanh at the end.

    Everything is a function of the single image (GroupNorm in place of BatchNorm), out of place and twice
    differentiable, for images of any size.

    Args:
        in_channels: channels of the images and of the result.
        width: channels of the first layer, a multiple of 8.

    Raises:
        ValueError: ``in_channels`` or ``width`` is out of range.

    >>> Autoencoder(in_channels=1, width=8)(torch.rand(5, 1, 9, 8)).shape
    torch.Size([5, 1, 9, 8])
    """

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        if check_count("width", width) % 8:
            raise ValueError(f"width is {width}, it must be a multiple of 8.")
        self.first = _block(in_channels, width, 1)
        self.down = nn.ModuleList([_block(width, 2 * width, 2), _block(2 * width, 4 * width, 2)])
        self.up = nn.ModuleList([_block(6 * width, 2 * width, 1), _block(3 * width, width, 1)])
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Values in (−1, 1) for images ``(B, C, H, W)`` in [0, 1], of their shape."""
        maps = [self.first(2 * image - 1)]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        x = maps.pop()
        for layer in self.up:
            beside = maps.pop()
            x = layer(torch.cat([F.interpolate(x, size=beside.shape[-2:]), beside], 1))
        return torch.tanh(self.last(x))


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())
