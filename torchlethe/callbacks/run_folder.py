"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from torchlethe.io import local_path


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder: the logger's, where checkpoints and configuration are, else ``default_root_dir``.

    Args:
        trainer: the Trainer, whose strategy is set up (from the ``setup`` hook on).

    Returns:
        The folder, which need not exist.

    Note:
        Under DDP every rank must call this, as rank 0 tells the others.
    """
    return local_path(trainer.log_dir or trainer.default_root_dir)
