"""How well a network learns from protected data: clean test accuracy over the epochs and per class."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.callbacks.evaluation_record import describe_run, publish
from torchlethe.callbacks.protection_pictures import draw_curves
from torchlethe.callbacks.run_clock import RunEvaluation
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.callbacks.sharpness_data import Source, find_test_source, find_train_source, set_up_test_data
from torchlethe.components import all_reduce_sum, eval_mode
from torchlethe.io import atomic_write

STAGES = ("fit", "test")


class ProtectionEvaluation(RunEvaluation):
    """Judge a network that is trained on (protected) data by the clean test set, for any module that gives logits.

    In a fit the test set is passed through the network after each epoch, and the training set, as it is trained on but
    not augmented, at the end. Written beside the run's other files, on rank 0 and atomically, all accuracies in
    percent:

    * ``evaluation.json``: ``acc_last`` (after the last epoch; the headline), ``acc_max`` (the best epoch, which
      somebody with clean validation data might stop at), ``train_accuracy``, ``acc_worst_class``, with a ``reference``
      the ``drop`` = its ``acc_last`` − this run's, with a ``clean_part`` the ``gain_over_clean_part``; ``run_seconds``;
      and ``meta`` with ``acc_max_epoch`` and ``per_class_accuracy``;
    * ``evaluation.npz``: ``confusion`` (K, K) int64, rows the true and columns the predicted classes;
      ``accuracy_curve`` (epochs,) float64, NaN for epochs that were not evaluated;
    * ``accuracy.png``: the curve, with the reference's.

    Args:
        reference: the ``evaluation.json`` of the same training on clean data, or the folder it lies in.
        clean_part: that of the same training on the clean part alone.
        every_n_epochs: how often the test set is passed in a fit; the last epoch always counts.
        stages: when to evaluate: at the end of ``fit``, of ``test``, or both.
        filename: name of the JSON file in the run's folder.
        loaders: data loaders ``test`` and ``train`` in place of the datamodule's, in a fixed order.

    Raises:
        ValueError: an argument is unknown; or, before training starts, a reference is missing or holds no ``acc_last``,
            or there are no test data.

    Note:
        Under DDP each rank passes its share, and the counts are summed. The clock of ``run_seconds`` stops meanwhile.
        Randomness of the training is left untouched.

    Example:
        >>> ProtectionEvaluation().filename
        'evaluation.json'
    """

    def __init__(
        self,
        reference: str | Path | None = None,
        clean_part: str | Path | None = None,
        every_n_epochs: int = 1,
        stages: Sequence[Literal["fit", "test"]] = ("fit", "test"),
        filename: str = "evaluation.json",
        loaders: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(stages, str) or any(stage not in STAGES for stage in stages):
            raise ValueError(f"stages={stages!r} must be a list out of {', '.join(STAGES)}.")
        check_at_least(1, every_n_epochs=every_n_epochs)
        if not filename.endswith(".json"):
            raise ValueError(f"filename={filename!r} must end in .json.")
        self.others = {"reference": reference, "clean_part": clean_part}
        self.every_n_epochs, self.stages, self.filename, self.loaders = every_n_epochs, tuple(stages), filename, loaders
        self.curve: dict[int, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be evaluated before training starts."""
        super().setup(trainer, pl_module, stage)
        if stage not in self.stages:
            return
        if stage == "fit":
            self.curve = {}
            set_up_test_data(trainer, self.loaders)
        for name in self.others:
            self._read(name)

    def _read(self, name: str) -> dict[str, Any]:
        """Another run's evaluation, with its curve where it has one; empty without one."""
        if (given := self.others[name]) is None:
            return {}
        path = Path(given) / self.filename if Path(given).is_dir() else Path(given)
        try:
            found = json.loads(path.read_text("utf-8"))
            float(found["acc_last"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{name} is '{given}', but there is no ProtectionEvaluation with an acc_last.") from None
        arrays = path.with_suffix(".npz")
        if arrays.is_file():
            with np.load(arrays, allow_pickle=False) as content:
                found["curve"] = content["accuracy_curve"] if "accuracy_curve" in content.files else None
        return found

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the test set."""
        if "fit" in self.stages and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            lap = self.clock.stop()
            self.curve[trainer.current_epoch] = _accuracy(self._confusion(trainer, pl_module, "test"))
            pl_module.log("acc", self.curve[trainer.current_epoch] / 100, prog_bar=True)
            if lap is not None:
                self.clock.start(lap)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far and the time spent, for a resumed fit."""
        return {**super().state_dict(), "curve": dict(self.curve)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self.curve = {int(epoch): float(value) for epoch, value in state_dict["curve"].items()}

    def _confusion(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Tensor:
        """(K, K) int64 counts on the CPU: rows the true, columns the predicted classes."""
        with isolate_rng():
            find = find_train_source if name == "train" else find_test_source
            source: Source | None = find(trainer, pl_module, self.loaders)
            if source is None:
                raise ValueError(
                    f"ProtectionEvaluation has no {name} data: give the Trainer a datamodule that has some."
                )
            limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
            counts: Tensor | None = None
            with torch.no_grad(), eval_mode(pl_module):
                for image, label in source.batches(trainer.global_rank, trainer.world_size, limit):
                    with trainer.precision_plugin.forward_context():
                        logits = pl_module(trainer.precision_plugin.convert_input(image))
                    if not isinstance(logits, Tensor) or logits.ndim != 2:
                        raise ValueError(f"{type(pl_module).__name__}.forward(image) must give logits (B, classes).")
                    classes = logits.shape[1]
                    found = torch.bincount(label * classes + logits.argmax(1), minlength=classes**2)
                    counts = found if counts is None else counts + found
            classes = getattr(pl_module, "num_classes", None) or (0 if counts is None else math.isqrt(len(counts)))
            if counts is None:  # this rank had no share
                counts = torch.zeros(classes**2, dtype=torch.int64, device=pl_module.device)
            return all_reduce_sum(counts).view(classes, classes).cpu()

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started, folder = time.perf_counter(), run_folder(trainer)  # the folder on every rank
        fitting = trainer.state.fn == "fit"
        confusion = self._confusion(trainer, pl_module, "test")
        per_class = (100 * confusion.diagonal().double() / confusion.sum(1).clamp_min(1)).tolist()
        last = _accuracy(confusion)
        metrics = {"acc_last": last}
        if fitting:
            self.curve[max(trainer.current_epoch - 1, 0)] = last  # the epoch counter has moved on
            best = max(self.curve, key=lambda epoch: (self.curve[epoch], -epoch))
            metrics["acc_max"] = self.curve[best]
            metrics["train_accuracy"] = _accuracy(self._confusion(trainer, pl_module, "train"))
        metrics["acc_worst_class"] = min(per_class)
        others = {name: self._read(name) for name in self.others}
        if others["reference"]:
            metrics["drop"] = float(others["reference"]["acc_last"]) - last
        if others["clean_part"]:
            metrics["gain_over_clean_part"] = last - float(others["clean_part"]["acc_last"])
        if not self._announce(trainer, metrics):
            return
        curve = np.full(max(self.curve, default=-1) + 1, np.nan)
        curve[list(self.curve)] = list(self.curve.values())
        seconds = {**self.clock.seconds, "evaluation": time.perf_counter() - started}
        meta = {
            **describe_run(trainer, {}, {}, {"every_n_epochs": self.every_n_epochs}, seconds),
            "acc_max_epoch": best + 1 if fitting else None,
            "per_class_accuracy": per_class,
            "references": {name: path and str(path) for name, path in self.others.items()},
        }
        with atomic_write((folder / self.filename).with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, confusion=confusion.numpy(), accuracy_curve=curve)
        if len(curve) > 1:
            self._draw(folder / "accuracy.png", curve, others["reference"].get("curve"))
        with atomic_write(folder / self.filename) as temporary:
            temporary.write_text(json.dumps({**metrics, "meta": meta}, indent=2, allow_nan=False) + "\n")
        publish(trainer, metrics, table=False)

    @staticmethod
    def _draw(path: Path, curve: np.ndarray, reference: np.ndarray | None) -> None:
        curves: Mapping[str, Any] = {"this run": curve, **({} if reference is None else {"reference": reference})}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            draw_curves(curves, "Clean test accuracy over epochs, %").savefig(file, format="png")


def _accuracy(confusion: Tensor) -> float:
    return 100 * float(confusion.diagonal().sum()) / max(1, int(confusion.sum()))
