"""Single numbers for a whole evaluation: average gap to Retrain, tug of war, speed-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchlethe.arguments import check_above

AVERAGE_GAP_METRICS = ("forget_accuracy", "remain_accuracy", "test_accuracy", "mia_entropy_logistic")
TUG_OF_WAR_METRICS = ("forget_accuracy", "remain_accuracy", "test_accuracy")
TUG_OF_WAR_MIA_METRICS = ("mia_confidence_svc", "remain_accuracy", "test_accuracy")


def metric_gaps(metrics: Mapping[str, float], reference: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """|metric − metric of Retrain| for each name.

    Args:
        metrics: the judged model's metrics by name.
        reference: Retrain's, in the same units.
        names: which to compare, at least one.

    Returns:
        The absolute gaps by name, in the order of ``names``.

    Raises:
        ValueError: ``names`` is empty or one of them is missing on a side.
    """
    if not names:
        raise ValueError("names is empty: give at least one metric to compare with the reference.")
    for title, known in (("metrics", metrics), ("reference", reference)):
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"{title} lacks {', '.join(missing)}, which the comparison with the reference needs.")
    return {name: abs(float(metrics[name]) - float(reference[name])) for name in names}


def average_gap(
    metrics: Mapping[str, float], reference: Mapping[str, float], names: Sequence[str] = AVERAGE_GAP_METRICS
) -> float:
    """Average gap (Avg. gap of SalUn, Avg.D of SFRon): mean over the named metrics of |metric − metric of Retrain|.

    All metrics must have the same unit, percent by custom. UA = 100 − FA gives the same gap as FA. For several seeds
    either apply it to the means over seeds (DualOptim) or to each seed and average; the two differ, so say which.

    Args:
        metrics: the judged model's metrics by name.
        reference: Retrain's.
        names: which to compare; the default is SFRon's choice FA, RA, TA and the entropy attack.

    Returns:
        ≥ 0, in the unit of the metrics; lower is better, 0 means indistinguishable by these metrics.

    Raises:
        ValueError: a name is missing on a side.

    Example:
        >>> run, retrain = {"FA": 96.0, "TA": 90.0}, {"FA": 94.0, "TA": 94.0}
        >>> average_gap(run, retrain, names=["FA", "TA"])
        3.0
    """
    gaps = metric_gaps(metrics, reference, names)
    return math.fsum(gaps.values()) / len(gaps)


def tug_of_war(
    metrics: Mapping[str, float], reference: Mapping[str, float], names: Sequence[str] = TUG_OF_WAR_METRICS
) -> float:
    """Tug of war, ToW = Π (1 − |Δ| / 100) over forget, remaining and test accuracy.

    ToW-MIA puts the SVC-confidence attack in place of the forget accuracy: ``names=TUG_OF_WAR_MIA_METRICS``.

    Args:
        metrics: the judged model's metrics in percent.
        reference: Retrain's, in percent.
        names: which to compare.

    Returns:
        0…1; higher is better, 1 means equal to Retrain in all three.

    Raises:
        ValueError: a name is missing on a side.

    Source:
        Zhao et al., *What makes unlearning hard and what to do about it* (NeurIPS 2024), code kairanzhao/RUM.

    Example:
        >>> retrain = {"forget_accuracy": 90.0, "remain_accuracy": 100.0, "test_accuracy": 90.0}
        >>> tug_of_war({"forget_accuracy": 100.0, "remain_accuracy": 100.0, "test_accuracy": 80.0}, retrain)
        0.81
    """
    return math.prod(1.0 - gap / 100.0 for gap in metric_gaps(metrics, reference, names).values())


def speed_up(seconds: float, retrain_seconds: float) -> float:
    """How many times faster than retraining a method was: retrain_seconds / seconds.

    Args:
        seconds: prepare + loop of the method, without evaluation.
        retrain_seconds: the same for Retrain, measured on the same hardware.

    Returns:
        > 0; higher is better, 1 is no gain.

    Raises:
        ValueError: a time is not positive.

    Example:
        >>> speed_up(30.0, 900.0)
        30.0
    """
    check_above(0, seconds=seconds, retrain_seconds=retrain_seconds)
    return retrain_seconds / seconds
