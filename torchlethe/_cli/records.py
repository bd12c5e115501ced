"""What a run records about itself: its configuration, beside its files and in its loggers, and its last metrics."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.files import atomic_write


class RecordConfig(SaveConfigCallback):
    """Write ``config.yaml``, and tell the loggers what Lightning does not: data, seed and settings of the Trainer.

    Lightning gives them the module's hyper-parameters only.

    Note:
        Under DDP rank 0 writes.
    """

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
