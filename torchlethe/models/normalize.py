"""Normalisation as a part of the model: images stay in [0, 1] everywhere outside."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlethe.models.heads import HeadAccess, features_of

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    # Maps [0, 1] to [-1, 1] for any number of channels: the ViT and Inception families of Google.
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}
"""Mean and standard deviation of the channels in [0, 1], by data set; one number serves any number of channels."""


class Normalize(nn.Module):
    """``(image - mean) / std`` for each channel, with both numbers as buffers that are saved with the weights.

    A state dict without them (weights trained elsewhere) loads too: the configured numbers stay.

    Args:
        mean: One number for each channel, or a single one for all channels, in [0, 1].
        std: The same for the standard deviation, positive.

    Raises:
        ValueError: Different lengths, or a standard deviation that is not positive.

    >>> Normalize([0.5], [0.25])(torch.full((1, 3, 1, 1), 0.75)).flatten().tolist()
    [1.0, 1.0, 1.0]
    """

    mean: Tensor
    std: Tensor
    constant_buffers = True  # tells torchlethe.io.load_weights that a file may lack them

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ValueError(
                f"mean and std must have the same positive length, got {len(mean)} and {len(std)} numbers."
            )
        if not min(std) > 0:
            raise ValueError(f"std must be positive, got {list(std)}.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.register_load_state_dict_pre_hook(_keep_own_statistics)

    def forward(self, image: Tensor) -> Tensor:
        """Normalise images ``(B, C, H, W)`` in [0, 1]; the result has their shape and dtype.

        Raises:
            TypeError: The images are integers.
            ValueError: The number of channels differs from that of the statistics.
        """
        if not image.is_floating_point():
            raise TypeError(f"image must be a floating-point tensor with values in [0, 1], got {image.dtype}.")
        if self.mean.shape[0] not in (1, image.shape[-3]):
            raise ValueError(f"image has {image.shape[-3]} channels, but the statistics are for {self.mean.shape[0]}.")
        return (image - self.mean.to(image.dtype)) / self.std.to(image.dtype)

    def extra_repr(self) -> str:
        """Show the numbers in ``repr``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def _keep_own_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict that has no statistics by those of the module."""
    for name in ("mean", "std"):
        state_dict.setdefault(prefix + name, getattr(module, name))


class NormalizedClassifier(HeadAccess, nn.Module):
    """A network behind :class:`Normalize`: takes images in [0, 1], returns logits.

    ``features`` and ``head`` are those of the network inside. ``load_state_dict`` also takes the state dict of the
    bare network (keys without ``network.``), so that weights trained elsewhere load without preparation.
    Stateless besides its parts; the same on every rank.

    Args:
        network: Classifier that expects normalised images.
        normalize: The normalisation.
    """

    def __init__(self, network: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.register_load_state_dict_pre_hook(_take_bare_keys)

    def features(self, image: Tensor) -> Tensor:
        """Compute what the classifier reads.

        Args:
            image: ``(B, C, H, W)`` in [0, 1].

        Returns:
            ``(B, D)`` features.
        """
        return features_of(self.network, self.normalize(image))

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: ``(B, C, H, W)`` in [0, 1].

        Returns:
            Logits ``(B, num_classes)``.
        """
        return self.network(self.normalize(image))


def _take_bare_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Move keys of a bare network below ``network.``; leave a state dict of the whole alone."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    own = (f"{prefix}network.", f"{prefix}normalize.")
    if keys and not any(key.startswith(own) for key in keys):
        for key in keys:
            state_dict[f"{prefix}network.{key[len(prefix) :]}"] = state_dict.pop(key)


def normalized(
    network: nn.Module,
    statistics: str | None = "cifar10",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> NormalizedClassifier:
    """Put a normalisation in front of a network, so that the whole takes images in [0, 1].

    In YAML::

        network:
          class_path: torchlethe.models.normalized
          init_args:
            network: {class_path: torchlethe.models.resnet18, init_args: {num_classes: 10}}
            statistics: cifar10

    Args:
        network: Classifier that expects normalised images.
        statistics: ``cifar10``, ``cifar100``, ``svhn``, ``imagenet``, ``tiny_imagenet``, ``half`` (to [-1, 1]) or
            ``none``; ignored when ``mean`` and ``std`` are given.
        mean: Own means of the channels, in [0, 1].
        std: Own standard deviations of the channels.

    Returns:
        The network with its normalisation.

    Raises:
        ValueError: An unknown name, or only one of ``mean`` and ``std``.

    >>> from torchlethe.models import resnet8
    >>> normalized(resnet8(), "cifar10")(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}.")
    if mean is None or std is None:
        name = statistics or "none"
        if name not in STATISTICS:
            close = difflib.get_close_matches(name, STATISTICS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {name!r}{hint}.")
        mean, std = STATISTICS[name]
    return NormalizedClassifier(network, Normalize(mean, std))
