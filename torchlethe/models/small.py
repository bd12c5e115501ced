"""Networks for small images such as scikit-learn's digits: an MLP and a small CNN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.base import FeatureNetwork
from torchlethe.models.checks import check_count


class MLP(FeatureNetwork):
    """Fully connected network on flattened images, ReLU after every hidden layer, no BatchNorm.

    Parameters: 26 122 with the defaults. Without BatchNorm, training on two ranks equals training on one.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        hidden: Widths of the hidden layers, at least one; the last one is the width of the features.

    Raises:
        ValueError: An argument is no positive integer, or ``hidden`` is empty.

    >>> import torch
    >>> MLP()(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__(num_classes, in_channels, exact_size=check_count("image_size", image_size))
        if not hidden:
            raise ValueError("hidden must name at least one width, got an empty sequence.")
        widths = [in_channels * image_size**2, *(check_count("hidden", width) for width in hidden)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.linear = nn.Linear(widths[-1], num_classes)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102 (documented in the base)
        x = image.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class SmallCNN(FeatureNetwork):
    """3×3 convolution to 16 channels and one of stride 2 to 32, each with BatchNorm and ReLU, then Linear 128, ReLU.

    Parameters: 71 802 with the defaults (8×8 grey images, 10 classes); 1 055 130 for 32×32 RGB. With ``pooled``, 5 178:
    the mean over the positions of the second map takes the place of the hidden layer, as in ResNets.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        pooled: Average over positions in place of the hidden layer.

    Raises:
        ValueError: An argument is no positive integer.

    >>> import torch
    >>> SmallCNN().features(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 128])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, pooled: bool = False) -> None:
        super().__init__(num_classes, in_channels, exact_size=check_count("image_size", image_size))
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.pooled = pooled
        if not pooled:
            self.hidden = nn.Linear(32 * ((image_size + 1) // 2) ** 2, 128)
        self.linear = nn.Linear(32 if pooled else 128, num_classes)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        return x.mean((2, 3)) if self.pooled else F.relu(self.hidden(x.flatten(1)))
