"""GoogLeNet in its CIFAR form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork, global_average


def _conv(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
    """Convolution (with bias), BatchNorm, ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


class _Inception(nn.Module):
    """Four parallel branches, stacked: 1×1; 3×3; two 3×3 (in place of 5×5); pooling. Each starts or ends with 1×1."""

    def __init__(
        self, in_channels: int, one: int, three_in: int, three: int, five_in: int, five: int, pool: int
    ) -> None:
        super().__init__()
        self.b1 = nn.Sequential(*_conv(in_channels, one, 1))
        self.b2 = nn.Sequential(*_conv(in_channels, three_in, 1), *_conv(three_in, three, 3))
        self.b3 = nn.Sequential(*_conv(in_channels, five_in, 1), *_conv(five_in, five, 3), *_conv(five, five, 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_conv(in_channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.b1(x), self.b2(x), self.b3(x), self.b4(x)), dim=1)


class GoogLeNet(FeatureNetwork):
    """GoogLeNet, Szegedy et al. 2015 (arXiv:1409.4842), with BatchNorm, for small images.

    The nine inception modules of table 1 of the paper behind a 3×3 stem of 192 channels; each 5×5 convolution is two
    3×3, as in Szegedy et al. 2016 (arXiv:1512.00567); no auxiliary classifiers. Same form and key names as
    github.com/kuangliu/pytorch-cifar. Images of at least 4×4 pixels. PyTorch's default initialisation.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels, minimum_size=4)
        self.pre_layers = nn.Sequential(*_conv(in_channels, 192, 3))
        self.a3 = _Inception(192, 64, 96, 128, 16, 32, 32)
        self.b3 = _Inception(256, 128, 128, 192, 32, 96, 64)
        self.a4 = _Inception(480, 192, 96, 208, 16, 48, 64)
        self.b4 = _Inception(512, 160, 112, 224, 24, 64, 64)
        self.c4 = _Inception(512, 128, 128, 256, 24, 64, 64)
        self.d4 = _Inception(512, 112, 144, 288, 32, 64, 64)
        self.e4 = _Inception(528, 256, 160, 320, 32, 128, 128)
        self.a5 = _Inception(832, 256, 160, 320, 32, 128, 128)
        self.b5 = _Inception(832, 384, 192, 384, 48, 128, 128)
        self.linear = nn.Linear(1024, num_classes)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = self.b3(self.a3(self.pre_layers(image)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.e4(self.d4(self.c4(self.b4(self.a4(x)))))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return global_average(self.b5(self.a5(x)))


def googlenet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build GoogLeNet in its CIFAR form: 6 166 250 parameters (10 classes, RGB), see :class:`GoogLeNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return GoogLeNet(num_classes, in_channels)
