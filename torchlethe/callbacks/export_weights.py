"""Weights that others can use without Lethe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchlethe.io import save_weights


class ExportWeights(Callback):
    """Write the network's parameters and buffers as a ``.safetensors`` file when a fit ends.

    Args:
        filename: path of the file, relative to the Trainer's ``default_root_dir``.
        attribute: the part of the module to export; the whole module when it has no such attribute.

    Raises:
        ValueError: the file name does not end in ``.safetensors``.

    Note:
        Under DDP rank 0 writes; sharded networks (FSDP2) are gathered first. A ``fast_dev_run`` writes nothing.
    """

    def __init__(self, filename: str = "weights.safetensors", attribute: str = "network") -> None:
        if not filename.endswith(".safetensors"):
            raise ValueError(f"filename is '{filename}', it must end in .safetensors.")
        self.filename = filename
        self.attribute = attribute

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        network = getattr(pl_module, self.attribute, pl_module)
        # every rank takes part, as a sharded network is gathered here
        state: Any = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            save_weights(state, Path(trainer.default_root_dir) / self.filename)
