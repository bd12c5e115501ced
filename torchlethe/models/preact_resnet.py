"""Pre-activation residual networks with the CIFAR stem, with and without squeeze-and-excitation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork, conv1x1, conv3x3, global_average


class _Block(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice; a 1×1 convolution behind the first ReLU where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, excitation: int = 0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.projects = stride > 1 or in_channels != out_channels
        if self.projects:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride))
        self.excites = excitation > 0
        if self.excites:
            self.fc1 = nn.Conv2d(out_channels, out_channels // excitation, 1)
            self.fc2 = nn.Conv2d(out_channels // excitation, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.excites:
            squeezed = residual.mean(dim=(2, 3), keepdim=True)
            residual = residual * torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))
        return residual + (self.shortcut(active) if self.projects else x)


class PreActResNet(FeatureNetwork):
    """Pre-activation residual network for small images, He et al. 2016 (arXiv:1603.05027).

    With ``excitation``, each residual is multiplied by channel weights computed from its global average: squeeze and
    excitation, Hu et al. 2018 (arXiv:1709.01507). PyTorch's default initialisation.

    Args:
        blocks: Blocks of the four stages, which have 64, 128, 256 and 512 channels.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        excitation: Reduction ratio of squeeze-and-excitation; 0 leaves it out.
        stem_norm: BatchNorm and ReLU behind the stem (key ``bn1``).
        final_norm: BatchNorm and ReLU behind the last block (key ``bn``), as in the paper; peers that leave it out
            have 1024 parameters less.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
        excitation: int = 0,
        stem_norm: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four positive integers, one for each stage, got {list(blocks)}.")
        if not 0 <= excitation <= 64:
            raise ValueError(f"excitation must lie between 0 (off) and 64, got {excitation}.")
        self.conv1 = conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64) if stem_norm else None
        widths = (64, 64, 128, 256, 512)
        stages = []
        for index, count in enumerate(blocks):
            first = _Block(widths[index], widths[index + 1], 1 if index == 0 else 2, excitation)
            rest = [_Block(widths[index + 1], widths[index + 1], 1, excitation) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(512) if final_norm else None
        self.linear = nn.Linear(512, num_classes)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = self.conv1(image)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn is not None:
            x = F.relu(self.bn(x))
        return global_average(x)


def preact_resnet18(num_classes: int = 10, in_channels: int = 3, final_norm: bool = True) -> nn.Module:
    """Build PreActResNet-18: 11 172 170 parameters (10 classes, RGB), see :class:`PreActResNet`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        final_norm: BatchNorm and ReLU in front of the pooling; ``False`` gives the form (and key names) of
            github.com/kuangliu/pytorch-cifar, with 11 171 146 parameters.

    Returns:
        The network, randomly initialised.
    """
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels, final_norm=final_norm)


def senet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build SENet-18: 11 260 354 parameters (10 classes, RGB), see :class:`PreActResNet`.

    The CIFAR form that poisoning papers evaluate on (github.com/kuangliu/pytorch-cifar): pre-activation blocks,
    reduction 16, BatchNorm behind the stem and none behind the last block.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Returns:
        The network, randomly initialised.
    """
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels, excitation=16, stem_norm=True, final_norm=False)
