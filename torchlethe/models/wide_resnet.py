"""Wide residual networks for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.arguments import check_within
from torchlethe.models.base import FeatureNetwork, conv1x1, conv3x3, global_average, kaiming_convolutions
from torchlethe.models.checks import check_count


class _Block(nn.Module):
    """Pre-activation block; where the shape changes, the shortcut is a 1×1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = F.relu(self.bn2(self.conv1(active)))
        if self.dropout > 0:
            residual = F.dropout(residual, self.dropout, training=self.training)
        return self.conv2(residual) + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(FeatureNetwork):
    """Wide residual network, Zagoruyko & Komodakis 2016 (arXiv:1605.07146).

    A stem of 16 channels and three stages of 16, 32 and 64 times ``widen`` channels. Convolutions are initialised from
    N(0, 2 / fan_in), the classifier as PyTorch does.

    Args:
        depth: Number of layers with weights, ``6 n + 4``: 10, 16, 22, 28, 34, 40 …
        widen: Factor of the widths.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        dropout: Probability between the two convolutions of a block, in [0, 1).

    Raises:
        ValueError: ``depth`` is not ``6 n + 4``, ``dropout`` is outside [0, 1), or another argument is not
            a positive integer.
    """

    def __init__(
        self, depth: int = 28, widen: int = 10, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__(num_classes, in_channels)
        if check_count("depth", depth) < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 for a positive integer n (10, 16, 22, 28 …), got {depth}.")
        check_within(0, 1, "[)", dropout=dropout)
        width = 16 * check_count("widen", widen)
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = self._stage(16, width, blocks, 1, dropout)
        self.layer2 = self._stage(width, 2 * width, blocks, 2, dropout)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, num_classes)
        kaiming_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, dropout: float) -> nn.Sequential:
        rest = [_Block(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(in_channels, out_channels, stride, dropout), *rest)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = self.layer3(self.layer2(self.layer1(self.conv1(image))))
        return global_average(F.relu(self.bn1(x)))


def wrn28_2(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Build WRN-28-2: 1 467 610 parameters (10 classes, RGB), see :class:`WideResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        dropout: Probability between the two convolutions of a block, in [0, 1).

    Returns:
        The network, randomly initialised.
    """
    return WideResNet(28, 2, num_classes, in_channels, dropout)


def wrn28_10(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Build WRN-28-10: 36 479 194 parameters (10 classes, RGB), see :class:`WideResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        dropout: Probability between the two convolutions of a block, in [0, 1).

    Returns:
        The network, randomly initialised.
    """
    return WideResNet(28, 10, num_classes, in_channels, dropout)
