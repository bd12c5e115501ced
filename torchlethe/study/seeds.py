"""The reference's seeds beside each other: what two retrainings differ in is the best that unlearning can reach.

Comparable are runs of the same split (data seed, noise and forget request), told by its hash: a Retrain of another
split has seen samples that this one has not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchlethe.functional.over_forgetting import over_forgetting
from torchlethe.functional.summary import average_gap
from torchlethe.metrics.comparison import COMPARED, Answers, agreement_metrics, over_forgetting_metrics
from torchlethe.metrics.evaluation import Outputs, divergence_metrics
from torchlethe.study.results import Run, gap_names

DISTANCES = {
    "kl_to_reference": "kl",
    "js_to_reference": "js",
    **{name: name for name in ("activation_distance", "completeness", "wasserstein1_confidence", "wasserstein1_loss")},
}


def compare_seeds(runs: Iterable[Run], reference: str | None) -> frozenset[str]:
    """Give each run of the reference its mean agreement with, and distance to, the other seeds' runs.

    Only what other rows have measured against the reference is added, and only where all seeds of the scenario have the
    same split.

    Args:
        runs: of all rows; those of the reference get more metrics.
        reference: title of its row.

    Returns:
        The names of the metrics that now say something about pairs of seeds of the reference.
    """
    runs = list(runs)
    added: set[str] = set()
    for scenario in dict.fromkeys(run.scenario for run in runs):
        here = [run for run in runs if run.scenario == scenario]
        own = [run for run in here if run.method == reference]
        splits = {run.meta.get("split_hash") for run in own}
        stored = [arrays for run in own if (arrays := _read(run.arrays))]
        if len(own) < 2 or len(splits) > 1 or None in splits or len(stored) < len(own):
            continue
        wanted = {name for run in here if run.method != reference for name in run.metrics}
        for run, arrays in zip(own, stored, strict=True):
            others = [pair for pair in zip(own, stored, strict=True) if pair[0] is not run]
            found = [compare_runs((run, arrays), other, wanted) for other in others]
            for name in set.intersection(*(set(metrics) for metrics in found)) & (wanted - run.metrics.keys()):
                run.metrics[name] = statistics.fmean(metrics[name] for metrics in found)
                added.add(name)
    return frozenset(added)


def compare_runs(
    own: tuple[Run, Mapping[str, Any]], other: tuple[Run, Mapping[str, Any]], wanted: Iterable[str]
) -> dict[str, float]:
    """What an evaluation would say about one run with another as its reference.

    Args:
        own: the judged run and its arrays.
        other: the run in the reference's place and its arrays.
        wanted: names of distances to measure.

    Returns:
        Metrics by name, finite ones.
    """
    (run, arrays), (reference, others) = own, other
    labels = {name: _tensor(arrays, f"label_{name}").long() for name in COMPARED if f"label_{name}" in arrays}
    metrics = agreement_metrics(labels, _answers(arrays, labels), _answers(others, labels))
    if all("logits_forget" in side for side in (arrays, others)) and "forget" in labels:
        names = [DISTANCES[name] for name in DISTANCES if name in set(wanted)]
        index = [_tensor(side, "index_forget") for side in (arrays, others)]
        if torch.equal(*index):
            outputs = [Outputs(_tensor(side, "logits_forget"), labels["forget"], index[0]) for side in (arrays, others)]
            metrics |= divergence_metrics(outputs[0], outputs[1], names)
    classes = [_classes(side.classes) for side in (run, reference)]
    metrics |= over_forgetting_metrics(*classes)
    levels = [side.metrics.get("forget_accuracy") for side in (run, reference)]
    if levels[0] is not None and levels[1] is not None:
        metrics["over_forgetting"] = over_forgetting(levels[0], levels[1])
    gaps = gap_names(run.meta)
    if all(name in side.metrics for name in gaps for side in (run, reference)):
        metrics["average_gap"] = average_gap(run.metrics, reference.metrics, gaps)
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _read(path: Path) -> dict[str, Any] | None:
    """The arrays that comparisons need; None where a file is missing or of an older version."""
    if not path.is_file():
        return None
    kinds = ("index", "label", "prediction", "confidence")
    wanted = {"logits_forget", *(f"{kind}_{name}" for kind in kinds for name in COMPARED)}
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in wanted if name in arrays.files}
    return found if "index_forget" in found and "label_forget" in found else None


def _answers(arrays: Mapping[str, Any], names: Iterable[str]) -> dict[str, Answers]:
    kinds = ("prediction", "confidence", "index")
    return {
        name: Answers(*(_tensor(arrays, f"{kind}_{name}") for kind in kinds))
        for name in names
        if all(f"{kind}_{name}" in arrays for kind in kinds)
    }


def _tensor(arrays: Mapping[str, Any], name: str) -> torch.Tensor:
    values = torch.from_numpy(arrays[name])
    return values if values.is_floating_point() else values.long()


def _classes(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    lists = found.get("accuracy", {})
    return {
        name: torch.tensor([np.nan if value is None else value for value in values], dtype=torch.float64)
        for name, values in lists.items()
    }
