"""Weights that others can use without Lethe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation
from torchlethe.io import save_weights


class ExportWeights(Callback):
    """Write the network's parameters and buffers as a ``.safetensors`` file when a fit ends.

    Args:
        filename: path of the file, relative to the run's folder: the logger's, else the Trainer's ``default_root_dir``.
        attribute: the part of the module to export, ``None`` for the whole module.

    Raises:
        ValueError: the file name does not end in ``.safetensors``; or, before training starts, the module has no such
            part, or the file would replace one that the run reads: the module's ``weights_path``, or the reference or
            original of an :class:`~torchlethe.callbacks.UnlearningEvaluation`.

    Note:
        Under DDP rank 0 writes; sharded networks (FSDP2) are gathered first. A ``fast_dev_run`` writes nothing.
    """

    def __init__(self, filename: str = "weights.safetensors", attribute: str | None = "network") -> None:
        if not filename.endswith(".safetensors"):
            raise ValueError(f"filename is '{filename}', it must end in .safetensors.")
        self.filename = filename
        self.attribute = attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to replace what the run reads."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = run_folder(trainer) / self.filename
        for title, path in _inputs(trainer, pl_module):
            if target.resolve() == path.resolve():
                raise ValueError(
                    f"ExportWeights would replace {title}, '{path}'; choose another filename or default_root_dir."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without the part to export, once ``configure_model`` has run."""
        self._part(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = run_folder(trainer) / self.filename
        # every rank takes part, as a sharded network is gathered here
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(self._part(pl_module), options=options)
        if trainer.is_global_zero:
            save_weights(state, target)

    def _part(self, pl_module: LightningModule) -> nn.Module:
        if self.attribute is None:
            return pl_module
        part = getattr(pl_module, self.attribute, None)
        if not isinstance(part, nn.Module):
            raise ValueError(
                f"attribute is '{self.attribute}', but {type(pl_module).__name__} has no such part to export; "
                "give the name of one, or null (None) for the whole module."
            )
        return part


def _inputs(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Path]]:
    """The weight files that the run reads, each with what the user knows it by."""
    if (own := getattr(pl_module, "weights_path", None)) is not None:
        yield "the module's own weights", Path(own)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, UnlearningEvaluation):
            for title in ("reference", "original"):
                if (path := getattr(callback, title)) is not None:
                    yield f"the {title} of UnlearningEvaluation", path
