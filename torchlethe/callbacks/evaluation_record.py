"""What stays of an evaluation: the two files, their reading by a later run, the run's description and the table."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from torchlethe.io import atomic_write, file_hash
from torchlethe.metrics.definitions import define_metric
from torchlethe.metrics.evaluation import Outputs

OTHERS = ("original", "reference")
"""The models whose metrics stand beside the run's own, and the prefixes of their names."""


def write_evaluation(
    path: Path,
    metrics: Mapping[str, float],
    meta: Mapping[str, Any],
    outputs: Mapping[str, Outputs],
    confidences: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write an evaluation as JSON and, beside it, its arrays as ``.npz``, both atomically.

    Args:
        path: the JSON file. It is written last: where it exists, the evaluation is complete.
        metrics: by name; what is not finite becomes ``null``.
        meta: everything else about the run, plain values only.
        outputs: the run's own outputs by set name, for ``index_<set>``.
        confidences: (N,) confidences by model and set name, for ``confidence_<set>`` of the run (named ``""``) and
            ``confidence_<set>_<model>`` of the others.
    """
    arrays = {f"index_{name}": found.index.numpy() for name, found in outputs.items()}
    for title, sets in confidences.items():
        arrays |= {f"confidence_{name}_{title}".rstrip("_"): values.cpu().numpy() for name, values in sets.items()}
    with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**plain, "meta": meta}, indent=2, allow_nan=False) + "\n")


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
        and (name.endswith("_accuracy") or name.startswith("mia_"))
    }
    return metrics if all(name in metrics for name in needed) else {}


def split_hash(trainer: Trainer) -> str | None:
    """The hash of the datamodule's ``split``, ``None`` where there is none."""
    return getattr(getattr(getattr(trainer, "datamodule", None), "split", None), "hash", None)


def describe_run(
    trainer: Trainer,
    outputs: Mapping[str, Outputs],
    weights: Mapping[str, Path | None],
    settings: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What one needs to know about a run to read its numbers: the ``meta`` of :func:`write_evaluation`.

    Args:
        trainer: the running Trainer, in a fit or a test.
        outputs: the run's own outputs by set name, of which the sizes are noted.
        weights: files by model, ``None`` for those without; noted with their SHA-256.
        settings: what the attacks' numbers depend on.
        seconds: of ``prepare`` and ``fit``, where measured, and of ``evaluation``.

    Returns:
        Plain values by name.
    """
    return {
        "stage": trainer.state.fn and trainer.state.fn.value,
        "module": type(trainer.lightning_module).__name__,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "split_hash": split_hash(trainer),
        "counts": {name: len(found.labels) for name, found in outputs.items()},
        **{model: path and {"path": str(path), "sha256": file_hash(path)} for model, path in weights.items()},
        "settings": settings,
        "hardware": _hardware(trainer),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "seconds": {lap: seconds.get(lap) for lap in ("prepare", "fit", "evaluation")},
    }


def publish(trainer: Trainer, metrics: Mapping[str, float], table: bool) -> None:
    """Give the metrics to the Trainer's loggers and, where it shows progress, to the reader of the console.

    Args:
        trainer: the running Trainer; call this on rank 0.
        metrics: by name; ``original_…`` and ``reference_…`` get columns of their own in the table. Loggers receive
            what is finite.
        table: whether to show the table.
    """
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        logger.log_metrics(finite, step=trainer.global_step)
    if table and trainer.progress_bar_callback is not None:
        _show_table(metrics)


def _show_table(metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    others = [f"{title}_" for title in OTHERS if any(name.startswith(f"{title}_") for name in metrics)]
    table = Table("metric", title="Unlearning evaluation", title_justify="left")
    for heading in ("this run", *("Retrain" if prefix == "reference_" else prefix[:-1] for prefix in others)):
        table.add_column(heading, justify="right")
    for name in metrics:
        if name.startswith(tuple(others)):
            continue
        definition = define_metric(name)
        title = definition.title if definition else name
        unit = f" ({definition.unit})" if definition and definition.unit else ""
        values = [metrics.get(prefix + name) for prefix in ("", *others)]
        table.add_row(title + unit, *("" if value is None else f"{value:.4g}" for value in values))
    Console().print(table)


def _hardware(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.processor() or platform.machine()}"
