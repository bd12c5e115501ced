"""What a model lost for each class against a reference, so that damage to few classes does not hide in an average.

An accuracy over all classes falls by one point where one class out of ten loses ten. Accuracies are in percent, drops
in points: positive where the judged model is worse than the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchlethe.functional.uncertainty import drop_padding


class ClassDrops(NamedTuple):
    """The drops of several classes as three numbers.

    Attributes:
        mean: mean over classes of max(0, drop), points.
        worst: the largest max(0, drop), points.
        worst_class: its class; −1 where no class lost anything.
    """

    mean: float
    worst: float
    worst_class: int


def class_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many samples of each class are classified correctly, and how many there are.

    Args:
        logits: (B, K).
        labels: (B,) integers in 0…K−1, −100 marks padding.

    Returns:
        Two (K,) int64 tensors on the device of the logits; both are sums over samples, so batches and ranks add up.

    Raises:
        ValueError: a shape or label is wrong.

    Example:
        >>> class_hits(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, -100]))
        (tensor([1, 0]), tensor([1, 1]))
    """
    classes = logits.shape[1] if logits.ndim == 2 else 0
    logits, labels = drop_padding(logits, labels)
    right = labels[logits.argmax(dim=1) == labels]
    return torch.bincount(right, minlength=classes), torch.bincount(labels, minlength=classes)


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of each class in percent.

    Args:
        logits: (B, K).
        labels: (B,) integers in 0…K−1, −100 marks padding.

    Returns:
        (K,) float64 in 0…100, NaN for a class without samples.

    Raises:
        ValueError: a shape or label is wrong.

    Example:
        >>> class_accuracy(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
        tensor([100.,   0.,  nan], dtype=torch.float64)
    """
    hits, counts = class_hits(logits, labels)
    return 100.0 * hits.double() / counts


def class_drops(accuracy: Tensor, reference_accuracy: Tensor, kept: Tensor | None = None) -> ClassDrops:
    """Over-forgetting per class: how far the classes that are to be kept fall below the reference's accuracy.

    Gains do not make up for losses: a class that the model knows better than the reference counts as 0.

    Args:
        accuracy: (K,) of the judged model, percent; NaN for a class without samples.
        reference_accuracy: (K,) of the reference, usually Retrain, on the same samples.
        kept: (K,) booleans, the classes that count; all by default. Leave a forgotten class out: there Retrain knows
            nothing that could be lost.

    Returns:
        Mean and largest drop in points, ≥ 0, lower is better; NaN where no class counts.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> kept = torch.tensor([True, True, False])
        >>> class_drops(torch.tensor([90.0, 60.0, 0.0]), torch.tensor([80.0, 70.0, 0.0]), kept)
        ClassDrops(mean=5.0, worst=10.0, worst_class=1)
    """
    if accuracy.ndim != 1 or accuracy.shape != reference_accuracy.shape:
        raise ValueError(
            f"accuracy and reference_accuracy must have one value for each class, got shapes {tuple(accuracy.shape)} "
            f"and {tuple(reference_accuracy.shape)}."
        )
    drops = (reference_accuracy.double() - accuracy.double()).clamp(min=0.0)
    counts = ~drops.isnan()
    if kept is not None:
        counts &= kept
    if not bool(counts.any()):
        return ClassDrops(float("nan"), float("nan"), -1)
    worst, position = drops.where(counts, drops.new_tensor(-1.0)).max(dim=0)
    return ClassDrops(float(drops[counts].mean()), float(worst), int(position) if worst > 0 else -1)


def over_forgetting(forget_accuracy: float, reference_forget_accuracy: float) -> float:
    """OF = max(0, FA of the reference − FA): forget samples that Retrain gets right by generalising, and the model not.

    Args:
        forget_accuracy: of the judged model, percent.
        reference_forget_accuracy: of the reference, usually Retrain.

    Returns:
        Points, ≥ 0; lower is better. It says nothing about forgetting too little, which is the gap's other side.

    Example:
        >>> over_forgetting(70.0, 77.5), over_forgetting(99.0, 77.5)
        (7.5, 0.0)
    """
    return max(0.0, float(reference_forget_accuracy) - float(forget_accuracy))
