"""From the outputs of an evaluation's passes to its numbers: one summary per model, and two models compared."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlethe.callbacks.evaluation_reference import KnownReference
from torchlethe.functional.divergence import parameter_distance, total_distance
from torchlethe.functional.over_forgetting import over_forgetting
from torchlethe.functional.relearning import Criterion
from torchlethe.functional.summary import TUG_OF_WAR_MIA_METRICS, average_gap, tug_of_war
from torchlethe.io import load_weights
from torchlethe.metrics.comparison import (
    Answers,
    agreement_metrics,
    answers,
    class_accuracies,
    over_forgetting_metrics,
)
from torchlethe.metrics.evaluation import Outputs, unlearning_metrics, validation_attacks

Summary = dict[str, Any]
"""Of one model: ``metrics``, and by set name ``classes`` (accuracies) and the parts of its answers; for checkpoints."""

PARTS = ("prediction", "confidence", "index")
LISTED = ("forget", "remain", "test", "test_remain")
"""The sets whose classes are listed; the others are parts of them."""


def summarise(sets: Mapping[str, Outputs], **settings: Any) -> Summary:
    """Everything that is kept of one model's outputs.

    Args:
        sets: outputs by set name.
        **settings: of :func:`torchlethe.metrics.evaluation.unlearning_metrics`.

    Returns:
        Plain values and tensors, nested in dicts, so that a checkpoint can hold them.
    """
    found = {name: answers(outputs) for name, outputs in sets.items()}
    listed = {name: sets[name] for name in LISTED if name in sets}
    return {
        "metrics": unlearning_metrics(sets, **settings) | validation_attacks(sets, **settings),
        "classes": class_accuracies(listed),
        **{part: {name: getattr(given, part) for name, given in found.items()} for part in PARTS},
    }


def answers_of(summary: Summary) -> dict[str, Answers]:
    """The answers in a summary, by set name; none in that of a checkpoint of an older version."""
    parts = [summary.get(part, {}) for part in PARTS]
    return {name: Answers(*(part[name] for part in parts)) for name in parts[0] if all(name in part for part in parts)}


def with_known(summary: Summary, known: KnownReference) -> Summary:
    """A summary of the forget set alone, completed by what the reference's own run measured."""
    for name, found in known.answers.items():
        for part in PARTS:
            summary[part].setdefault(name, getattr(found, part))
    return {
        **summary,
        "metrics": summary["metrics"] | known.metrics,
        "classes": {**known.classes, **summary["classes"]},
    }


def compare(
    own: Summary, reference: Summary, labels: Mapping[str, Tensor], gap_names: Sequence[str]
) -> dict[str, float]:
    """Everything that two summaries say together.

    Args:
        own: of the judged model.
        reference: of Retrain.
        labels: (N,) int64 by set name.
        gap_names: metrics of the average gap.

    Returns:
        Metrics by name: average gap, tug of war, agreements and over-forgetting; with a set ``validation`` on both
        sides also ``validation_gap``, the average gap with that set in place of the test set.
    """
    ours, theirs = own["metrics"], reference["metrics"]
    metrics = {"average_gap": average_gap(ours, theirs, gap_names), "tug_of_war": tug_of_war(ours, theirs)}
    held_out = [re.sub("^(test_|(?=mia_))", "validation_", name) for name in gap_names]
    if all(name in side for name in held_out for side in (ours, theirs)):
        metrics["validation_gap"] = average_gap(ours, theirs, held_out)
    if all(name in side for name in TUG_OF_WAR_MIA_METRICS for side in (ours, theirs)):
        metrics["tug_of_war_mia"] = tug_of_war(ours, theirs, TUG_OF_WAR_MIA_METRICS)
    metrics |= agreement_metrics(labels, answers_of(own), answers_of(reference))
    metrics["over_forgetting"] = over_forgetting(ours["forget_accuracy"], theirs["forget_accuracy"])
    return metrics | over_forgetting_metrics(own["classes"], reference["classes"])


def per_class(
    summaries: Mapping[str, Summary], labels: Mapping[str, Tensor], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The accuracy of each class as plain lists.

    Args:
        summaries: by model, the judged one named ``""``.
        labels: (N,) int64 by set name.
        names: of the classes, where known.

    Returns:
        ``counts``, ``accuracy``, ``original`` and ``reference``: by set name a list with a value for each class (NaN
        without samples), and ``names`` where known.
    """
    own = summaries[""]["classes"]
    classes = max((len(values) for values in own.values()), default=0)
    counts = {name: torch.bincount(labels[name], minlength=classes).tolist() for name in own}
    lists: dict[str, Any] = {"names": list(names)} if names is not None and len(names) == classes else {}
    lists["counts"] = counts
    for model, summary in summaries.items():
        lists[model or "accuracy"] = {name: values.tolist() for name, values in summary.get("classes", {}).items()}
    return lists


def layer_distances(network: nn.Module, weights: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """How far a network's parameters are from those of a file.

    Args:
        network: the judged network.
        weights: the reference's file, for :func:`torchlethe.io.load_weights`.

    Returns:
        ``parameter_distance`` and ``parameter_distance_relative``, and by parameter name both of that tensor.
    """
    with torch.no_grad():
        other = load_weights(copy.deepcopy(network), weights)
        both = dict(network.named_parameters()), dict(other.named_parameters())
        total, layers = total_distance(*both), parameter_distance(*both)
    metrics = {"parameter_distance": total[0], "parameter_distance_relative": total[1]}
    return metrics, {name: list(pair) for name, pair in layers.items()}


def forget_level(found: Answers, labels: Tensor, rows: Tensor, criterion: Criterion = "accuracy") -> float:
    """Accuracy in percent, or mean loss in nats, of some forget samples.

    Args:
        found: a model's answers on the forget set.
        labels: (N,) of the forget set.
        rows: (M,) positions of the samples.
        criterion: ``accuracy`` or ``loss``.
    """
    if criterion == "accuracy":
        right = found.prediction[rows] == labels[rows]
        return 100.0 * float(right.double().mean()) if bool(found.confidence.isfinite().all()) else math.nan
    return float(-found.confidence[rows].double().clamp(min=1e-30).log().mean())
