"""Choosing positions by class: stratified and class-balanced draws."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlethe.data.hashing import generator_for


def _draw(labels: Tensor, classes: Tensor, quotas: list[int], seed: int) -> Tensor:
    order = torch.randperm(len(labels), generator=generator_for("split", seed))
    shuffled = labels[order]
    chosen = [order[shuffled == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return torch.cat(chosen).sort().values


def stratified(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Draw ``count`` positions so that each class has the share it has in ``labels`` (largest remainders round up).

    Args:
        labels: (N,) int64.
        count: Number of positions, 0 < count < N.
        seed: The draw is a pure function of (labels, count, seed).

    Returns:
        (count,) int64 positions in ascending order.

    Raises:
        ValueError: If ``count`` is out of range.

    >>> stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 3).shape
    torch.Size([3])
    """
    if not 0 < count < len(labels):
        raise ValueError(
            f"count is {count}, but must lie between 1 and {len(labels) - 1} to split {len(labels)} samples."
        )
    classes, sizes = labels.unique(return_counts=True)
    shares = sizes.double() * count / len(labels)
    quotas = shares.floor().long()
    remainders = shares - quotas
    quotas[remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    return _draw(labels, classes, quotas.tolist(), seed)


def class_balanced(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Draw ``count`` positions with equally many of each class (the first classes get the remainder).

    Args:
        labels: (N,) int64.
        count: Number of positions, 0 < count <= N.
        seed: The draw is a pure function of (labels, count, seed).

    Returns:
        (count,) int64 positions in ascending order.

    Raises:
        ValueError: If a class has too few samples.

    >>> labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    >>> labels[class_balanced(labels, 6)].tolist()
    [0, 0, 1, 1, 2, 2]
    """
    classes, sizes = labels.unique(return_counts=True)
    share, rest = divmod(count, len(classes))
    quotas = [share + (i < rest) for i in range(len(classes))]
    if count <= 0 or any(quota > size for quota, size in zip(quotas, sizes.tolist(), strict=True)):
        smallest = int(sizes.min())
        before = int((sizes == smallest).nonzero()[0])  # the classes before the first that small may give one more
        raise ValueError(
            f"subset is {count}, but the smallest class has {smallest} samples, "
            f"so a class-balanced subset has 1 to {smallest * len(classes) + before}."
        )
    return _draw(labels, classes, quotas, seed)
