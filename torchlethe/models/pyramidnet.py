"""PyramidNet for CIFAR: a residual network whose width grows with every block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork, conv3x3, global_average, kaiming_convolutions, pad_channels
from torchlethe.models.checks import check_count


class _Block(nn.Module):
    """BatchNorm, convolution, BatchNorm, ReLU, convolution, BatchNorm; the shortcut is pooled and padded with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.extra = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn3(self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x))))))
        if self.stride > 1:
            # ceil_mode: the convolution rounds odd sizes up, so must the pooling.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.extra > 0:
            x = pad_channels(x, 0, self.extra)
        return residual + x


class PyramidNet(FeatureNetwork):
    """Additive PyramidNet with basic blocks, Han et al. 2017 (arXiv:1610.02915).

    Block ``k`` of ``N = (depth - 2) / 2`` has ``16 + k alpha / N`` channels (rounded), in three stages of equal length.
    Convolutions are initialised from N(0, 2 / fan_out).

    Args:
        depth: Number of layers with weights, ``6 n + 2``; the paper has 110.
        alpha: Channels that the last block has more than the stem.
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Raises:
        ValueError: ``depth`` is not ``6 n + 2``, or another argument is no positive integer.
    """

    def __init__(self, depth: int = 110, alpha: int = 270, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        if check_count("depth", depth) < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 for a positive integer n (8, 14, 20 … 110 …), got {depth}.")
        check_count("alpha", alpha)
        per_stage = (depth - 2) // 6
        total = 3 * per_stage
        widths = [16, *(round(16 + k * alpha / total) for k in range(1, total + 1))]
        blocks = [_Block(widths[k], widths[k + 1], 2 if k in (per_stage, 2 * per_stage) else 1) for k in range(total)]
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*blocks[:per_stage])
        self.layer2 = nn.Sequential(*blocks[per_stage : 2 * per_stage])
        self.layer3 = nn.Sequential(*blocks[2 * per_stage :])
        self.bn_final = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)
        kaiming_convolutions(self, mode="fan_out")

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = self.bn1(self.conv1(image))
        x = self.layer3(self.layer2(self.layer1(x)))
        return global_average(F.relu(self.bn_final(x)))


def pyramidnet110(num_classes: int = 10, in_channels: int = 3, alpha: int = 270) -> nn.Module:
    """Build PyramidNet-110: 28 485 477 parameters with alpha 270, 1 772 706 with 48 (10 classes, RGB).

    See :class:`PyramidNet`. The sharpness-aware literature uses alpha 270.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        alpha: Channels that the last block has more than the stem: 48, 84 and 270 in the paper.

    Returns:
        The network, randomly initialised.
    """
    return PyramidNet(110, alpha, num_classes, in_channels)
