"""What stays of an evaluation: the two files, the run's description and the table."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from torchlethe.files import to_json
from torchlethe.io import atomic_write, file_hash
from torchlethe.metrics.comparison import Answers
from torchlethe.metrics.definitions import define_metric
from torchlethe.metrics.evaluation import Outputs

OTHERS = ("original", "reference")
"""The models whose metrics stand beside the run's own, and the prefixes of their names."""

MOST_LOGITS = 1 << 22
"""Larger forget sets keep their logits to themselves: 16 MiB in the file."""


def write_evaluation(
    path: Path,
    metrics: Mapping[str, float],
    lists: Mapping[str, Any],
    meta: Mapping[str, Any],
    outputs: Mapping[str, Outputs],
    answers: Mapping[str, Mapping[str, Answers]],
) -> None:
    """Write an evaluation as JSON and, beside it, its arrays as ``.npz``, both atomically.

    Args:
        path: the JSON file. It is written last: where it exists, the evaluation is complete.
        metrics: by name.
        lists: what is no single number, plain values or nested lists of them by name. Here and in the metrics, what is
            not finite becomes ``null``.
        meta: everything else about the run, plain values only.
        outputs: the run's own outputs by set name, for ``index_<set>``, ``label_<set>`` and ``logits_forget``.
        answers: by model and set name, for ``confidence_<set>`` and ``prediction_<set>`` of the run (named ``""``) and
            the same with ``_<model>`` of the others.
    """
    arrays = {f"index_{name}": found.index.numpy() for name, found in outputs.items()}
    forget = outputs["forget"].logits
    arrays |= {f"label_{name}": smallest(found.labels, forget.shape[1]) for name, found in outputs.items()}
    if forget.numel() <= MOST_LOGITS:
        arrays["logits_forget"] = forget.float().numpy()
    for title, sets in answers.items():
        for name, found in sets.items():
            suffix = f"{name}_{title}".rstrip("_")
            arrays[f"confidence_{suffix}"] = found.confidence.cpu().numpy()
            arrays[f"prediction_{suffix}"] = smallest(found.prediction, forget.shape[1])
    with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    content = finite_or_null({**metrics, **lists, "meta": meta})
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(content), "utf-8")


def smallest(numbers: Tensor, count: int) -> np.ndarray:
    """Numbers from 0 to count − 1 in the smallest unsigned type that holds them."""
    return numbers.cpu().numpy().astype(np.min_scalar_type(max(count - 1, 0)))


def finite_or_null(value: Any) -> Any:
    """Plain values, nested, with ``None`` in place of what JSON has no word for.

    Example:
        >>> finite_or_null({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_null(item) for name, item in value.items()}
    return [finite_or_null(item) for item in value] if isinstance(value, list | tuple) else value


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
