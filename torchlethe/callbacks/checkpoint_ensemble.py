"""Keep checkpoints of a training run as an ensemble: weights only, in files that anyone can read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.components.checkpoint_folder import LIST, Checkpoint, CheckpointFolder, write_list
from torchlethe.functional.self_ensemble import equidistant
from torchlethe.io import WRAPPERS, file_hash, save_weights


class CheckpointEnsemble(Callback):
    """Write the weights of any LightningModule over its training, for use as an ensemble afterwards.

    Each checkpoint is a ``.safetensors`` file of parameters and buffers, without optimizer state; ``ensemble.json``
    lists them with epoch, step, sha256 and what was logged. :class:`~torchlethe.components.CheckpointFolder` reads the
    folder and chooses N at equal distances (``select``); a :class:`~torchlethe.components.NetworkEnsemble` runs them.

    Args:
        dirpath: the folder; by default ``ensemble`` in the run's folder.
        every_n_epochs: an epoch's end is a candidate when this divides the number of epochs done.
        max_keep: keep at most so many, at equal distances. Where the Trainer's ``max_epochs`` alone says how long the
            run is (no ``max_steps``, ``max_time`` or early stopping), only the candidates that ``select(max_keep)``
            would choose are written, so the last one is among them; otherwise every second one is dropped, and the
            distance doubled, whenever there would be one too many. None keeps every candidate.
        dtype: in which floating tensors are stored: ``native``, ``float32``, ``bfloat16`` or ``float16``.
        submodule: dotted name of the part of the module to store, ``None`` for the whole module.

    Raises:
        ValueError: an argument is out of range, the module has no such part, or the folder holds the ensemble of a run
            that came to its end.

    Note:
        Works in anyone's Trainer; memory does not grow with the number of checkpoints. Weights are stored as they are
        in training: averaging (EMA, SWA) would make the checkpoints more alike. Under DDP rank 0 writes; sharded
        networks (FSDP2) are gathered first. Files are written atomically. A run that is resumed goes on with its list:
        what was written after the checkpoint it resumes from is dropped and written again. A run that died is replaced
        by the next one that starts anew in the same folder. A ``fast_dev_run`` writes nothing.

    Example:
        >>> CheckpointEnsemble(max_keep=30).every_n_epochs
        1
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_epochs: int = 1,
        max_keep: int | None = None,
        dtype: Literal["native", "float32", "bfloat16", "float16"] = "native",
        submodule: str | None = "network",
    ) -> None:
        check_at_least(1, every_n_epochs=every_n_epochs, max_keep=1 if max_keep is None else max_keep)
        check_choice(("native", "float32", "bfloat16", "float16"), dtype=dtype)
        self.dirpath, self.every_n_epochs, self.max_keep = dirpath, every_n_epochs, max_keep
        self.dtype, self.submodule = dtype, submodule
        self.folder: Path | None = None
        self.kept: list[Checkpoint] = []
        self.distance = 1
        self._wanted: set[int] | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; refuse one that holds a finished run's ensemble."""
        if stage != "fit":
            return
        own = run_folder(trainer) / "ensemble"  # on every rank, as rank 0 tells the others
        self.folder = own if self.dirpath is None else Path(self.dirpath)
        path = self.folder / LIST
        if trainer.ckpt_path is None and path.is_file() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                complete = bool(CheckpointFolder(self.folder).about.get("complete"))
            except ValueError:
                complete = False
            if complete:
                raise ValueError(
                    f"dirpath '{self.folder}' already holds the ensemble of a finished run; choose another or "
                    "remove it."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the part is there, which epochs to keep, and what a resumed run had."""
        self._part(pl_module)
        self.kept, self.distance, self._wanted = [], 1, None
        epochs = trainer.max_epochs or 0
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        early = any(isinstance(callback, EarlyStopping | Timer) for callback in callbacks)
        if self.max_keep is not None and epochs > 0 and trainer.max_steps < 0 and not early:
            candidates = epochs // self.every_n_epochs
            chosen = equidistant(candidates, min(self.max_keep, candidates)) if candidates else []
            self._wanted = set(chosen)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the list of a resumed run, and make the folder agree with it."""
        if self._restored is not None:
            self.distance = self._restored["distance"]
            listed = [Checkpoint(**entry) for entry in self._restored["kept"]]
            self._restored = None
            assert self.folder is not None
            # what is missing was thinned out after the checkpoint, and would be again
            self.kept = [checkpoint for checkpoint in listed if (self.folder / checkpoint.file).is_file()]
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._tidy(pl_module, complete=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this epoch's weights when they are wanted."""
        if trainer.fast_dev_run or not self._is_wanted(trainer.current_epoch):  # type: ignore[attr-defined]
            return
        assert self.folder is not None
        # every rank takes part, as a sharded network is gathered here
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(self._part(pl_module), options=options)
        name = f"epoch-{trainer.current_epoch:04d}.safetensors"
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        sha256 = ""
        if trainer.is_global_zero:
            sha256 = file_hash(save_weights(self._converted(state), self.folder / name))
        checkpoint = Checkpoint(
            name, trainer.current_epoch, trainer.global_step, trainer.strategy.broadcast(sha256), metrics
        )
        self.kept = [*(old for old in self.kept if old.epoch < checkpoint.epoch), checkpoint]
        if self.max_keep is not None and len(self.kept) > self.max_keep:
            self.distance *= 2
            self.kept = [old for old in self.kept if (self._number(old.epoch) + 1) % self.distance == 0]
        if trainer.is_global_zero:
            self._tidy(pl_module, complete=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the ensemble is whole."""
        if trainer.is_global_zero and not trainer.fast_dev_run and not trainer.interrupted:  # type: ignore[attr-defined]
            self._tidy(pl_module, complete=True)

    def state_dict(self) -> dict[str, Any]:
        """The list so far, for a resumed run."""
        return {"kept": [asdict(checkpoint) for checkpoint in self.kept], "distance": self.distance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the list until training starts."""
        self._restored = state_dict

    def _number(self, epoch: int) -> int:
        """Which candidate an epoch is, from 0."""
        return (epoch + 1) // self.every_n_epochs - 1

    def _is_wanted(self, epoch: int) -> bool:
        if (epoch + 1) % self.every_n_epochs:
            return False
        number = self._number(epoch)
        return (number + 1) % self.distance == 0 if self._wanted is None else number in self._wanted

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = None if self.dtype == "native" else getattr(torch, self.dtype)
        return {
            WRAPPERS.sub("", name): value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for name, value in state.items()
        }

    def _tidy(self, pl_module: LightningModule, complete: bool) -> None:
        """Write the list first, then remove files that it does not name: a kill in between leaves no gap."""
        assert self.folder is not None
        about = {
            "submodule": self.submodule,
            "dtype": self.dtype,
            "complete": complete,
            "num_classes": getattr(pl_module, "num_classes", None),
        }
        if not self.kept and not (self.folder / LIST).is_file():
            return
        write_list(self.folder, self.kept, **about)
        named = {checkpoint.file for checkpoint in self.kept}
        for path in self.folder.glob("epoch-*.safetensors"):
            if path.name not in named:
                path.unlink()

    def _part(self, pl_module: LightningModule) -> nn.Module:
        if self.submodule is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.submodule)
        except AttributeError:
            raise ValueError(
                f"submodule is '{self.submodule}', but {type(pl_module).__name__} has no such part to store; give the "
                "name of one, or null (None) for the whole module."
            ) from None
