"""DenseNet-121 in its CIFAR form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.arguments import check_within
from torchlethe.models.base import FeatureNetwork, conv1x1, conv3x3, global_average
from torchlethe.models.checks import check_count


class _Bottleneck(nn.Module):
    """A 1×1 convolution to ``4 growth`` channels and a 3×3 to ``growth``, stacked on top of the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((new, x), dim=1)


class _Transition(nn.Module):
    """A 1×1 convolution to fewer channels and 2×2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(FeatureNetwork):
    """Densely connected network with bottlenecks and compression (DenseNet-BC), Huang et al. 2017 (arXiv:1608.06993).

    The CIFAR form has a 3×3 stem of ``2 growth`` channels and no max-pooling; key names are those of
    github.com/kuangliu/pytorch-cifar. Images of at least 8×8 pixels. PyTorch's default initialisation.

    Args:
        blocks: Bottlenecks of the four dense blocks.
        growth: Channels that each bottleneck adds.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        compression: Share of the channels that a transition keeps, in (0, 1].
    """

    def __init__(
        self,
        blocks: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        compression: float = 0.5,
    ) -> None:
        super().__init__(num_classes, in_channels, minimum_size=8)
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four positive integers, one for each stage, got {list(blocks)}.")
        check_within(0, 1, "(]", compression=compression)
        width = 2 * check_count("growth", growth)
        self.conv1 = conv3x3(in_channels, width)
        dense, transitions = [], []
        for count in blocks:
            dense.append(nn.Sequential(*(_Bottleneck(width + k * growth, growth) for k in range(count))))
            width += count * growth
            if len(dense) < 4:
                transitions.append(_Transition(width, int(width * compression)))
                width = int(width * compression)
        self.dense1, self.dense2, self.dense3, self.dense4 = dense
        self.trans1, self.trans2, self.trans3 = transitions
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = self.conv1(image)
        x = self.trans1(self.dense1(x))
        x = self.trans2(self.dense2(x))
        x = self.trans3(self.dense3(x))
        return global_average(F.relu(self.bn(self.dense4(x))))


def densenet121(num_classes: int = 10, in_channels: int = 3, growth: int = 32) -> nn.Module:
    """Build DenseNet-121 in its CIFAR form: 6 956 298 parameters (10 classes, RGB), see :class:`DenseNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        growth: Channels that each bottleneck adds; 12 gives the light form (1 000 618 parameters) that poisoning papers
            call DenseNet-121.

    Returns:
        The network, randomly initialised.
    """
    return DenseNet((6, 12, 24, 16), growth, num_classes, in_channels)
