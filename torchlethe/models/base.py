"""What every network of this package shares: the features/head split and small building blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.models.checks import check_count, check_image
from torchlethe.models.heads import HeadAccess


class FeatureNetwork(HeadAccess, nn.Module):
    """Base of the networks: ``forward(image) = head(features(image))``.

    A subclass calls ``super().__init__``, builds its layers, ends with ``self.linear`` (the classifier, always under
    this name) and implements :meth:`embed`. Everything is out of place, so that gradients of gradients work, and
    nothing depends on values of tensors, so that ``torch.compile(fullgraph=True)`` works. Networks hold no state
    besides parameters and BatchNorm statistics; under DDP each rank normalises over its own part of the batch
    (Lightning's ``sync_batchnorm`` changes that).

    Args:
        num_classes: Number of classes, at least 2.
        in_channels: Channels of the images, at least 1.
        minimum_size: Smallest height and width in pixels that the network can take.
        exact_size: The only height and width that it can take (networks that flatten a map or embed positions).

    Attributes:
        head: The classifier, an ``nn.Linear``; assigning another module replaces it.
    """

    linear: nn.Module

    def __init__(
        self, num_classes: int, in_channels: int = 3, minimum_size: int = 1, exact_size: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes, 2)
        self.in_channels = check_count("in_channels", in_channels)
        self.minimum_size = minimum_size
        self.exact_size = exact_size

    def embed(self, image: Tensor) -> Tensor:
        """Compute the features of checked images.

        Args:
            image: ``(B, C, H, W)`` floating point.

        Returns:
            ``(B, D)``, what the classifier reads.
        """
        raise NotImplementedError

    def features(self, image: Tensor) -> Tensor:
        """Compute what the classifier reads.

        Args:
            image: ``(B, C, H, W)`` floating point, normalised as the weights expect it.

        Returns:
            ``(B, D)`` features.

        Raises:
            TypeError: The images are integers.
            ValueError: Wrong shape, channels or size.
        """
        check_image(image, self.in_channels, self.minimum_size, self.exact_size)
        return self.embed(image)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: ``(B, C, H, W)`` floating point.

        Returns:
            Logits ``(B, num_classes)``.
        """
        return self.linear(self.features(image))


def global_average(x: Tensor) -> Tensor:
    """Average a map ``(B, C, H, W)`` over its positions, giving ``(B, C)``."""
    return x.mean(dim=(2, 3))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3×3 convolution that keeps the size (divided by ``stride``), without bias since BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 1×1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def pad_channels(x: Tensor, before: int, after: int) -> Tensor:
    """Add channels of zeros on both sides of the existing ones.

    Args:
        x: ``(B, C, H, W)``.
        before: Channels in front.
        after: Channels behind.

    Returns:
        ``(B, before + C + after, H, W)``.
    """
    return F.pad(x, (0, 0, 0, 0, before, after))


def kaiming_convolutions(network: nn.Module, mode: str = "fan_in") -> None:
    """Draw the weights of all convolutions from N(0, 2 / fan), He et al. 2015 (arXiv:1502.01852); biases become zero.

    Args:
        network: Changed in place.
        mode: ``fan_in`` or ``fan_out``.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parameter_count(network: nn.Module) -> int:
    """Count the parameters of a network (shared ones once; buffers not).

    Args:
        network: Any module.

    Returns:
        Number of scalars.

    >>> parameter_count(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in network.parameters())
