"""VGG-16 with BatchNorm in its CIFAR form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchlethe.models.base import FeatureNetwork, global_average, kaiming_convolutions

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(FeatureNetwork):
    """VGG with BatchNorm, Simonyan & Zisserman 2015 (arXiv:1409.1556), and a single Linear behind the convolutions.

    3×3 convolutions with bias, BatchNorm, ReLU; 2×2 max-pooling behind each of the stages. Images of 32×32 pixels leave
    a 1×1 map; what larger ones leave is averaged. Convolutions are initialised from N(0, 2 / (9 C_out)), their biases
    with zero.

    Args:
        stages: Channels of the convolutions, by stage.
        num_classes: Number of classes.
        in_channels: Channels of the images.
    """

    def __init__(self, stages: Sequence[Sequence[int]] = _VGG16, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels, minimum_size=2 ** len(stages))
        layers: list[nn.Module] = []
        width = in_channels
        for stage in stages:
            for channels in stage:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width, num_classes)
        kaiming_convolutions(self, mode="fan_out")

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        return global_average(self.layers(image))


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build VGG-16-BN in its CIFAR form: 14 728 266 parameters (10 classes, RGB), see :class:`VGG`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images, of at least 32×32 pixels.

    Returns:
        The network, randomly initialised.
    """
    return VGG(_VGG16, num_classes, in_channels)
