"""The thin residual networks of He et al. 2015 for CIFAR (section 4.2 of arXiv:1512.03385), option-A shortcuts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork, conv3x3, global_average, kaiming_convolutions, pad_channels
from torchlethe.models.checks import check_count


class _Block(nn.Module):
    """Two 3×3 convolutions; a shortcut without parameters (option A) where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        extra = out_channels - in_channels
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.before + self.after > 0:
            x = pad_channels(x, self.before, self.after)
        return F.relu(residual + x)


class CifarResNet(FeatureNetwork):
    """CIFAR residual network: three stages of widths 16, 32, 64, global average pooling, one Linear.

    Key names (``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear``) are those of
    github.com/akamaster/pytorch_resnet_cifar10, whose weights load as they are.

    Args:
        depth: Number of layers with weights, ``6 n + 2``: 8, 14, 20, 32, 44, 56, 110 …
        num_classes: Number of classes.
        in_channels: Channels of the images.
        width: Channels of the first stage.

    Raises:
        ValueError: ``depth`` is not ``6 n + 2``, or another argument is no positive integer.

    >>> import torch
    >>> CifarResNet(8).features(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 64])
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__(num_classes, in_channels)
        if check_count("depth", depth) < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 for a positive integer n (8, 14, 20, 32, 44, 56 …), got {depth}.")
        check_count("width", width)
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        kaiming_convolutions(self)
        nn.init.kaiming_normal_(self.linear.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(in_channels, out_channels, stride), *rest)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(image)))
        return global_average(self.layer3(self.layer2(self.layer1(x))))


def resnet8(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR ResNet-8: 75 290 parameters (10 classes, RGB), see :class:`CifarResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return CifarResNet(8, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR ResNet-20: 269 722 parameters (10 classes, RGB), see :class:`CifarResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return CifarResNet(20, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR ResNet-32: 464 154 parameters (10 classes, RGB), see :class:`CifarResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return CifarResNet(32, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR ResNet-56: 853 018 parameters (10 classes, RGB), see :class:`CifarResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return CifarResNet(56, num_classes, in_channels)
