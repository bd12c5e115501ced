"""A model beside Retrain on all sets: agreement sample by sample, over-forgetting class by class, from summaries.

A summary is what stays of a model's outputs on a set without its logits: enough to compare with it later, from a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlethe.functional.agreement import correctness_agreement, prediction_agreement, score_correlation
from torchlethe.functional.over_forgetting import class_accuracy, class_drops
from torchlethe.metrics.evaluation import Outputs

COMPARED = ("forget", "remain", "test")
"""The sets on which models are compared sample by sample."""


@dataclass(frozen=True)
class Answers:
    """A model's answers on one set, in the order of its outputs.

    Attributes:
        prediction: (N,) int64, the most probable class.
        confidence: (N,) float32, the true label's probability; NaN where the outputs were not finite.
        index: (N,) int64, the samples' positions in their data set.
    """

    prediction: Tensor
    confidence: Tensor
    index: Tensor


def answers(outputs: Outputs) -> Answers:
    """The answers that outputs give."""
    return Answers(outputs.logits.argmax(dim=1), outputs.confidence(), outputs.index)


def agreement_metrics(
    labels: Mapping[str, Tensor], own: Mapping[str, Answers], reference: Mapping[str, Answers]
) -> dict[str, float]:
    """Agreement with the reference sample by sample, on the sets that both know.

    Args:
        labels: (N,) int64 by set name.
        own: the judged model's answers by set name.
        reference: the reference's; a set with other samples, or in another order, is left out.

    Returns:
        ``agreement_<set>`` and ``correctness_agreement_<set>`` in percent for forget, remaining and test set, and
        ``confidence_correlation`` on the forget set; NaN where an output was not finite.
    """
    metrics: dict[str, float] = {}
    for name in COMPARED:
        ours, theirs = own.get(name), reference.get(name)
        if ours is None or theirs is None or not torch.equal(ours.index, theirs.index):
            continue
        finite = bool(ours.confidence.isfinite().all()) and bool(theirs.confidence.isfinite().all())
        both = ours.prediction, theirs.prediction
        same = prediction_agreement(*both), correctness_agreement(*both, labels[name])
        for title, values in zip(("agreement", "correctness_agreement"), same, strict=True):
            metrics[f"{title}_{name}"] = 100.0 * float(values.double().mean()) if finite else math.nan
        if name == "forget":
            metrics["confidence_correlation"] = score_correlation(ours.confidence, theirs.confidence)
    return metrics


def class_accuracies(sets: Mapping[str, Outputs]) -> dict[str, Tensor]:
    """Accuracy of each class in percent, (K,) float64 by set name, NaN for a class without samples."""
    return {name: class_accuracy(outputs.logits, outputs.labels) for name, outputs in sets.items()}


def over_forgetting_metrics(own: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """What the classes that are to be kept lost against the reference.

    A class counts where remaining samples have its label. On the test set the part that is not to be forgotten counts
    (``test_remain``, where the request divides the test set).

    Args:
        own: of :func:`class_accuracies` for the judged model.
        reference: the same for the reference.

    Returns:
        ``class_drop_<set>`` (mean over classes of max(0, drop)) and ``worst_class_drop_<set>`` for ``test`` and
        ``remain``, points; nothing where a set is missing on a side.
    """
    if "remain" not in own:
        return {}
    kept = ~own["remain"].isnan()
    metrics: dict[str, float] = {}
    for title, name in (("test", "test_remain" if "test_remain" in own else "test"), ("remain", "remain")):
        if name in own and name in reference and own[name].shape == reference[name].shape:
            drops = class_drops(own[name], reference[name], kept)
            metrics |= {f"class_drop_{title}": drops.mean, f"worst_class_drop_{title}": drops.worst}
    return metrics
