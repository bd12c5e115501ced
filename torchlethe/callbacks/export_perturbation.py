"""A universal perturbation and its evaluation as files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.io import atomic_write


class ExportPerturbation(Callback):
    """Write what a universal attack leaves: v as ``.npz`` and ``.png`` after fit and predict, its numbers after test.

    The files lie in the run's folder: ``perturbation.npz`` (array ``v`` in pixel units, ``xi``, ``p`` and a description
    in JSON), ``perturbation.png`` (v scaled, −ξ black, ξ white) and, after a test, ``evaluation.json`` with every
    logged number, which studies read.

    Args:
        filename: name of the files of v, without suffix.

    Raises:
        ValueError: the module has no ``export``, or v exceeds its bound.

    Note:
        Under DDP rank 0 writes. A ``fast_dev_run`` writes nothing.
    """

    def __init__(self, filename: str = "perturbation") -> None:
        if not filename or Path(filename).suffix in (".npz", ".png"):
            raise ValueError(f"filename is {filename!r}, it must be a name without .npz or .png.")
        self.filename = filename

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that learns no perturbation."""
        if not callable(getattr(pl_module, "export", None)):
            raise ValueError(f"ExportPerturbation is for universal attacks, {type(pl_module).__name__} has no export.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write v."""
        self._write(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write v."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            module: Any = pl_module
            for suffix in (".npz", ".png"):
                module.export(folder / f"{self.filename}{suffix}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the numbers, and where they come from."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        plain = {name: value if math.isfinite(value) else None for name, value in sorted(values.items())}
        with atomic_write(folder / "evaluation.json") as temporary:
            text = json.dumps({**plain, "meta": module.about()}, indent=2, allow_nan=False, default=str)
            temporary.write_text(text + "\n", "utf-8")
