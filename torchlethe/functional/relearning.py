"""Relearning time: how soon fine-tuning on the forget set brings back what a model was made to forget."""

from __future__ import annotations

import math
from typing import Literal

from torchlethe.arguments import check_at_least

Criterion = Literal["accuracy", "loss"]


def relearning_target(original: float, margin: float, criterion: Criterion = "accuracy") -> float:
    """The level on the forget set at which a model counts as having relearned.

    Args:
        original: the original model's forget accuracy in percent, or its mean forget loss in nats.
        margin: how far from it counts as back: points, or nats.
        criterion: ``accuracy`` (at least original − margin) or ``loss`` (at most original + margin).

    Returns:
        The level, in the unit of ``original``.

    Raises:
        ValueError: ``margin`` is negative.

    Example:
        >>> relearning_target(98.0, 5.0)
        93.0
    """
    check_at_least(0, margin=margin)
    return original - margin if criterion == "accuracy" else original + margin


def has_relearned(value: float, target: float, criterion: Criterion = "accuracy") -> bool:
    """Whether a level on the forget set is back.

    Args:
        value: accuracy in percent, or loss in nats.
        target: of :func:`relearning_target`.
        criterion: ``accuracy`` or ``loss``.

    Returns:
        False for NaN. Differences at rounding level count as equal, as both sides are means over the same samples.
    """
    tolerance = 1e-9 * max(1.0, abs(target))
    return value >= target - tolerance if criterion == "accuracy" else value <= target + tolerance


def anamnesis_index(steps: float, reference_steps: float) -> float:
    """AIN = relearning time of the model / relearning time of Retrain, both back to within the original's margin.

    Args:
        steps: the judged model's relearning time, ≥ 0.
        reference_steps: Retrain's, ≥ 0.

    Returns:
        1 is the ideal. Far below 1 the model still holds what it was to forget; far above 1 it was damaged beyond
        what forgetting needs. NaN where Retrain needs no step: then nothing is to be relearned.

    Raises:
        ValueError: a time is negative.

    Source:
        Chundawat et al., *Zero-shot machine unlearning* (IEEE TIFS 2023), anamnesis index.

    Example:
        >>> anamnesis_index(30, 40), anamnesis_index(3, 0)
        (0.75, nan)
    """
    check_at_least(0, steps=steps, reference_steps=reference_steps)
    return steps / reference_steps if reference_steps else math.nan
