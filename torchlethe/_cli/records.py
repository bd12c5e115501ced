"""What a run records about itself: its configuration, beside its files and in its loggers, and its last metrics."""

from __future__ import annotations

import contextlib
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
    a run that is refused there replaces nothing. And a run that ends before its first batch takes the numbered folders
    of its loggers away, such as ``lightning_logs/version_3``, if nothing else was written there.

    Note:
        Under DDP rank 0 writes and removes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._began = time.time() - 1  # file systems round
        self._older: set[Path] = set()
        self._told = self._worked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the loggers, before Lightning writes their hyper-parameters, and note which folders are not new."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
            self._older = {folder for folder in logger_folders(trainer) if _is_older(folder, self._began)}

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, str(trainer.state.fn))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on the folders stay."""
        self._worked = True

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what says nothing but that there was a run."""
        if trainer.is_global_zero and not self._worked:
            for folder in logger_folders(trainer) - self._older:
                with contextlib.suppress(OSError):  # the exception counts, not this
                    remove_traces(folder, self._began)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, if a run had no batches at all."""
        if trainer.world_size == 1:
            self._save(trainer, pl_module)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add data, seed and Trainer to the hyper-parameters of each logger."""
        if self._told or not trainer.loggers:
            return
        self._told = True
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


def logger_folders(trainer: Trainer) -> set[Path]:
    """The local folders that the loggers of a run write to; call it on rank 0."""
    folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    return {Path(folder) for folder in folders if folder is not None and "://" not in str(folder)}


def _is_older(folder: Path, since: float) -> bool:
    return folder.is_dir() and any(path.stat().st_mtime < since for path in folder.iterdir())


def remove_traces(folder: Path, since: float) -> None:
    """Remove what a run leaves by starting, unless there is more: its files, its numbered folder, and an empty parent.

    Args:
        folder: of one of its loggers; it need not exist.
        since: when the run began, in seconds since 1970; older files are not its own.
    """
    if not folder.is_dir() or _is_older(folder, since):
        return
    found = list(folder.iterdir())
    if any(not path.name.startswith(TRACES) for path in found):
        return
    for path in found:
        path.unlink()
    if folder.name.startswith("version_"):
        folder.rmdir()
        if folder.parent.resolve() != Path.cwd() and not any(folder.parent.iterdir()):
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
