"""What a run records about itself: its configuration, beside its files and in its loggers, and its last metrics."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.files import atomic_write

TRACES = ("config.yaml", "hparams.yaml", "events.out.tfevents.")


class RecordConfig(SaveConfigCallback):
    """Write ``config.yaml``, and tell the loggers what Lightning does not: data, seed and settings of the Trainer.

    Lightning gives them the module's hyper-parameters only. The file is written when all ``setup`` hooks have passed:
    a run that is refused there replaces nothing. And a run that ends before its first batch takes its numbered folder
    away, such as ``lightning_logs/version_3``, if nothing else was written there.

    Note:
        Under DDP rank 0 writes and removes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._began = time.time() - 1  # file systems round
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember where."""
        folder = trainer.log_dir or trainer.default_root_dir  # on every rank, as it is broadcast
        self._folder = Path(folder) if trainer.is_global_zero and "://" not in folder else None

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, str(trainer.state.fn))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the folder stays."""
        self._folder = None

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on the folder stays."""
        self._folder = None

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on the folder stays."""
        self._folder = None

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on the folder stays."""
        self._folder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what says nothing but that there was a run."""
        if self._folder is not None:
            remove_traces(self._folder, self._began)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add data, seed and Trainer to the hyper-parameters of each logger."""
        if not trainer.loggers:
            return
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=True))
        settings: dict[str, Any] = {key: config[key] for key in ("seed_everything", "data") if key in config}
        plain = {key: value for key, value in config.get("trainer", {}).items() if not isinstance(value, dict | list)}
        settings["trainer"] = plain
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # its table of hyper-parameters keeps the first call's only, which must be the module's
                logger.hparams.update(settings)
            else:
                logger.log_hyperparams(settings)


def remove_traces(folder: Path, since: float) -> None:
    """Remove what a run leaves by starting, unless there is more: its files, its numbered folder, and an empty parent.

    Args:
        folder: of the run; it need not exist.
        since: when the run began, in seconds since 1970; older files are not its own.
    """
    found = list(folder.iterdir()) if folder.is_dir() else []
    if any(not path.name.startswith(TRACES) or path.stat().st_mtime < since for path in found):
        return
    for path in found:
        path.unlink()
    if folder.is_dir() and folder.name.startswith("version_"):
        folder.rmdir()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def record_metrics(trainer: Trainer) -> None:
    """Write what was logged last as ``metrics.json`` in the run's folder; what is not finite becomes ``null``.

    Args:
        trainer: after a fit or a validation.

    Note:
        Every rank must call this; rank 0 writes.
    """
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    plain = {name: value if math.isfinite(value) else None for name, value in sorted(values.items())}
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", "utf-8")
