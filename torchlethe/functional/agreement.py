"""Whether a model does to each sample what the reference does: numbers that equal accuracies do not give.

Two models with the same accuracy may be right about different samples. Each function compares sample by sample, so both
sides belong to the same samples in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_agreement(predictions: Tensor, reference_predictions: Tensor) -> Tensor:
    """Whether both models predict the same class, for each sample.

    The mean over the forget set is the *completeness* of the field, see
    :func:`~torchlethe.functional.divergence.completeness`, which starts from logits.

    Args:
        predictions: (N,) integers, the judged model's argmax.
        reference_predictions: (N,) integers, the reference's.

    Returns:
        (N,) booleans.

    Raises:
        ValueError: the shapes differ.
    """
    _check("predictions", predictions, "reference_predictions", reference_predictions)
    return predictions == reference_predictions


def correctness_agreement(predictions: Tensor, reference_predictions: Tensor, labels: Tensor) -> Tensor:
    """Whether both models are right, or both are wrong, for each sample.

    Args:
        predictions: (N,) integers, the judged model's argmax.
        reference_predictions: (N,) integers, the reference's.
        labels: (N,) integers.

    Returns:
        (N,) booleans; at least as often true as :func:`prediction_agreement`, as two models may be wrong in two ways.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> correctness_agreement(torch.tensor([1, 2, 0]), torch.tensor([1, 3, 4]), torch.tensor([1, 1, 0]))
        tensor([ True,  True, False])
    """
    _check("predictions", predictions, "reference_predictions", reference_predictions)
    _check("predictions", predictions, "labels", labels)
    return (predictions == labels) == (reference_predictions == labels)


def score_correlation(scores: Tensor, reference_scores: Tensor) -> float:
    """Pearson's correlation of two models' scores over samples, for example of their confidences in the true label.

    Args:
        scores: (N,) real numbers of the judged model.
        reference_scores: (N,) real numbers of the reference.

    Returns:
        In −1…1, 1 is perfect; NaN for less than two samples, or where a side gives all samples the same score.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> round(score_correlation(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.4, 0.6])), 6)
        1.0
    """
    _check("scores", scores, "reference_scores", reference_scores)
    if len(scores) < 2:
        return float("nan")
    a, b = (values.double() - values.double().mean() for values in (scores, reference_scores))
    # rounding leaves about 1e-16 of a constant
    constant = any(
        float(centred.abs().max()) <= 1e-12 * max(float(values.abs().max()), 1e-30)
        for centred, values in ((a, scores), (b, reference_scores))
    )
    if constant:
        return float("nan")
    return float(torch.dot(a / a.norm(), b / b.norm()).clamp(-1.0, 1.0))


def _check(name: str, values: Tensor, other: str, others: Tensor) -> None:
    if values.ndim != 1 or values.shape != others.shape:
        raise ValueError(
            f"{name} and {other} must have one value for each sample, got shapes {tuple(values.shape)} and "
            f"{tuple(others.shape)}."
        )
