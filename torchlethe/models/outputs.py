"""What a classifier computes on the way to its logits."""

from __future__ import annotations

from torch import Tensor, nn

from torchlethe.models.base import FeatureNetwork
from torchlethe.models.heads import through_head
from torchlethe.models.normalize import NormalizedClassifier


def features_and_logits(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what the classifier of a network reads and what it says, in one pass.

    Args:
        network: any classifier with a linear head under one of the usual names (:func:`torchlethe.models.head_name`).
        image: what its ``forward`` takes, ``(B, C, H, W)``.

    Returns:
        Features ``(B, D)`` and logits ``(B, K)``, with autograd.

    Raises:
        ValueError: the network has no known head, or one that reads something else than one row for each image.
    """
    if isinstance(network, NormalizedClassifier):
        return features_and_logits(network.network, network.normalize(image))
    if isinstance(network, FeatureNetwork):
        features = network.features(image)
        return features, network.linear(features)
    return through_head(network, image)
