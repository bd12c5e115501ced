"""What the reference's own run has measured already, so that others need not pass everything through it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlethe.callbacks.evaluation_record import OTHERS
from torchlethe.metrics.comparison import COMPARED, Answers


@dataclass(frozen=True)
class KnownReference:
    """What stands in for passes through the reference on all sets but the forget set.

    Attributes:
        metrics: accuracies and attacks by name.
        classes: (K,) accuracies of the classes by set name.
        answers: by set name.
    """

    metrics: dict[str, float]
    classes: dict[str, Tensor]
    answers: dict[str, Answers]


def read_reference_evaluation(path: Path) -> dict[str, Any]:
    """The evaluation that the reference's own run wrote.

    Args:
        path: the JSON file.

    Returns:
        Its content, empty where there is no such file.

    Raises:
        ValueError: the file is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"the reference's evaluation '{path}' is no JSON file, remove or repeat it.") from None


def known_reference(
    path: Path, found: Mapping[str, Any], split: str | None, settings: Mapping[str, Any], needed: Sequence[str]
) -> KnownReference | None:
    """What another run's evaluation says, where it can stand in for passes through its model.

    Args:
        path: its JSON file; the arrays lie beside it.
        found: the content of that file, or empty.
        split: hash of this run's split, ``None`` when unknown.
        settings: what this run's numbers depend on, as in ``meta``.
        needed: metrics without which the file is of no use.

    Returns:
        ``None`` unless split and settings are the same and all that is needed is there; a file of an older version
        lacks the answers of single samples.
    """
    metrics = usable_metrics(found, split, settings, needed)
    lists = found.get("per_class", {}).get("accuracy", {})
    arrays = path.with_suffix(".npz")
    if not metrics or not all(name in lists for name in COMPARED) or not arrays.is_file():
        return None
    answers = {}
    with np.load(arrays, allow_pickle=False) as stored:
        for name in COMPARED:
            keys = [f"{kind}_{name}" for kind in ("prediction", "confidence", "index")]
            if not all(key in stored.files for key in keys):
                return None
            prediction, confidence, index = (torch.from_numpy(stored[key]) for key in keys)
            answers[name] = Answers(prediction.long(), confidence, index)
    classes = {name: torch.tensor(values, dtype=torch.float64) for name, values in _with_nan(lists).items()}
    return KnownReference(metrics, classes, answers)


def usable_metrics(
    found: Mapping[str, Any], split: str | None, settings: Mapping[str, Any], needed: Sequence[str]
) -> dict[str, float]:
    """Accuracies and attacks of another run's evaluation, where they can stand in for passes through its model.

    Args:
        found: the content of its JSON file, or empty.
        split: hash of this run's split, ``None`` when unknown.
        settings: what this run's numbers depend on, as in ``meta``.
        needed: metrics without which the file is of no use.

    Returns:
        The other run's own metrics by name; empty unless split and settings are the same and all needed are there.

    Example:
        >>> found = {"test_accuracy": 90.0, "meta": {"split_hash": "abc", "settings": {"seed": 0}}}
        >>> usable_metrics(found, "abc", {"seed": 0}, ["test_accuracy"])
        {'test_accuracy': 90.0}
        >>> usable_metrics(found, "xyz", {"seed": 0}, ["test_accuracy"])
        {}
    """
    meta = found.get("meta", {})
    if split is None or meta.get("split_hash") != split or meta.get("settings") != settings:
        return {}
    metrics = {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float)
        and not name.startswith(tuple(f"{title}_" for title in OTHERS))
        and (name.endswith("_accuracy") or name.startswith(("mia_", "validation_mia_")))
    }
    return metrics if all(name in metrics for name in needed) else {}


def known_relearning(
    found: Mapping[str, Any], split: str | None, settings: Mapping[str, Any], target: float
) -> tuple[int, bool] | None:
    """The reference's relearning time as its own run measured it.

    Args:
        found: the content of its JSON file, or empty.
        split: hash of this run's split, ``None`` when unknown.
        settings: how this run measures.
        target: the level that this run asks for.

    Returns:
        Steps and whether the level was reached; ``None`` unless it was measured in the same way on the same samples.
    """
    meta = found.get("meta", {})
    record, steps = meta.get("relearning") or {}, found.get("relearning_steps")
    same = split is not None and meta.get("split_hash") == split and record.get("settings") == settings
    if not same or steps is None or abs(record.get("target", float("inf")) - target) > 1e-9:
        return None
    return int(steps), bool(record.get("reached"))


def _with_nan(lists: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
    return {name: [float("nan") if value is None else value for value in values] for name, values in lists.items()}
