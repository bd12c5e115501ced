"""Predictions on disk: one row of logits per sample, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.data import PADDING_INDEX
from torchlethe.io import atomic_write
from torchlethe.metrics.passes import gather_rows
from torchlethe.metrics.roles import distinct_rows


class SavePredictions(BasePredictionWriter):
    """Write the logits of a ``predict`` as an ``.npz`` file with the arrays ``index`` and ``logits``.

    ``index`` (N,) int64 is the samples' index in their batches or, where batches have none, their position in the data
    set; ``logits`` is (N, K) float32. The rows are sorted by index, padding (index −1) is left out, and the file is
    written atomically into the run's folder: the logger's, else the Trainer's ``default_root_dir``.

    Args:
        filename: name of the file, ending in ``.npz``; with several data loaders each gets a file of its own, as
            ``predictions_0.npz``.

    Raises:
        ValueError: the file name ends otherwise, ``predict_step`` returns no ``{"logits": (B, K)}``, or under DDP the
            position of the samples is unknown.

    Note:
        Under DDP the rows of all ranks are gathered, repeated ones are dropped, and rank 0 writes. A ``fast_dev_run``
        writes nothing.

    Example:
        >>> SavePredictions("digits.npz").filename
        'digits.npz'
    """

    def __init__(self, filename: str = "predictions.npz") -> None:
        if not filename.endswith(".npz"):
            raise ValueError(f"filename is '{filename}', it must end in .npz.")
        super().__init__("batch")
        self.filename = filename
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self.parts = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the rows of a batch on the CPU."""
        logits = prediction.get("logits") if isinstance(prediction, dict) else None
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                f"SavePredictions needs {type(pl_module).__name__}.predict_step to return a dict with 'index' (B,) and "
                f"'logits' (B, classes), got {_described(prediction)}."
            )
        parts = self.parts.setdefault(dataloader_idx, [])
        if isinstance(batch, dict) and "index" in batch:
            index = prediction.get("index", batch["index"]).cpu()
        elif batch_indices:
            index = torch.tensor(batch_indices)
        elif trainer.world_size == 1:
            index = torch.arange(len(logits)) + sum(len(rows) for rows, _ in parts)
        else:
            raise ValueError(
                "SavePredictions needs batches with an 'index' (B,) to order the samples of several ranks."
            )
        # a copy: on the CPU the tensor may be a buffer that the next batch reuses
        parts.append((index.long(), logits.detach().to("cpu", torch.float32, copy=True)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows and write the file."""
        folder = run_folder(trainer)
        for number in sorted(self.parts):
            columns = [torch.cat(column) for column in zip(*self.parts[number], strict=True)]
            columns = [column[columns[0] != PADDING_INDEX] for column in columns]
            if trainer.world_size > 1:
                strategy, keep = trainer.strategy, trainer.is_global_zero
                columns = [gather_rows(c, strategy.all_gather, keep=keep, device=strategy.root_device) for c in columns]
                rows = distinct_rows(columns[0])
            else:
                rows = columns[0].argsort(stable=True)
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                index, logits = (column[rows].numpy() for column in columns)
                with atomic_write(self._target(folder, number)) as temporary, temporary.open("wb") as file:
                    np.savez(file, index=index, logits=logits)
        self.parts = {}

    def _target(self, folder: Path, number: int) -> Path:
        path = folder / self.filename
        return path if len(self.parts) == 1 else path.with_stem(f"{path.stem}_{number}")


def _described(prediction: Any) -> str:
    if isinstance(prediction, dict):
        return f"the keys {', '.join(map(repr, prediction))}"
    return f"shape {tuple(prediction.shape)}" if isinstance(prediction, Tensor) else f"a {type(prediction).__name__}"
