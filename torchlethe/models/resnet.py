"""ResNet-18 and -34 with the CIFAR stem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork, conv1x1, conv3x3, global_average


class _Block(nn.Module):
    """Two 3×3 convolutions; a 1×1 convolution with BatchNorm as shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(FeatureNetwork):
    """Residual network of basic blocks for images of 32×32 or 64×64 pixels: a 3×3 stem of stride 1, no max-pooling.

    Widths and blocks as in table 1 of He et al. 2015 (arXiv:1512.03385); the stem is the usual change for CIFAR, and
    key names are those of github.com/kuangliu/pytorch-cifar. PyTorch's default initialisation.

    Args:
        blocks: Basic blocks of the four stages.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(
        self, blocks: Sequence[int] = (2, 2, 2, 2), num_classes: int = 10, in_channels: int = 3, width: int = 64
    ) -> None:
        super().__init__(num_classes, in_channels)
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four positive integers, one for each stage, got {list(blocks)}.")
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks[0], stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, blocks[3], stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(in_channels, out_channels, stride), *rest)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(image)))
        return global_average(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build ResNet-18 with the CIFAR stem: 11 173 962 parameters (10 classes, RGB), see :class:`ResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return ResNet((2, 2, 2, 2), num_classes, in_channels)


def resnet34(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build ResNet-34 with the CIFAR stem: 21 282 122 parameters (10 classes, RGB), see :class:`ResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return ResNet((3, 4, 6, 3), num_classes, in_channels)
