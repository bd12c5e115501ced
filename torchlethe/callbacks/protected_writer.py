"""The protected data set that a prediction leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from torchlethe.callbacks.protection_pictures import draw_protection, preview_rows
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.data import PADDING_INDEX, as_batch
from torchlethe.data.protected import read_protected
from torchlethe.data.publishing import ProtectedStore
from torchlethe.io import atomic_write

FormatName = Literal["png", "png_flat", "npz", "parquet"]


class ProtectedWriter(BasePredictionWriter):
    """Write what a protection predicts as a data set that others use without Lethe, and check it.

    In the folder, when the prediction has ended:

    * ``images/<class>/<index>.png`` (format ``png``, for torchvision's ``ImageFolder``), ``flat/<index>.png``
      (``png_flat``), ``protected.npz`` with ``image``, ``label``, ``index`` (``npz``), and
      ``train-00000-of-00001.parquet`` in the schema of the Hugging Face ``datasets`` library (``parquet``);
    * ``images.csv``: index, label, class and the change of each image;
    * ``manifest.json``: method and settings, bound, a hash of the clean images, hashes of the files, and that every
      pixel was read back from the files and no image exceeds the bound;
    * ``preview.png``: some images, their perturbations magnified, and the protected images.

    While it runs, each finished batch is a file below ``parts``. A killed run that is started again with the same
    arguments goes on behind them; what is finished is not computed again.

    Args:
        dirpath: the folder; ``protected`` in the run's folder (the logger's, else ``default_root_dir``) by default.
        formats: out of ``png``, ``png_flat``, ``npz``, ``parquet``.
        preview: images in the preview; 0 for none.

    Raises:
        ValueError: an argument is unknown; before work starts, the module is no protection, its predictions come from a
            shuffled or unlabelled source, or the folder holds something else; an image exceeds the bound.

    Note:
        Under DDP each rank writes its own batches into the folder, which all ranks must see; rank 0 finishes. Padding
        duplicates are left out. A ``fast_dev_run`` writes nothing.

    Example:
        >>> ProtectedWriter(formats=["npz"]).formats
        ('npz',)
    """

    def __init__(
        self, dirpath: str | Path | None = None, formats: Sequence[FormatName] = ("png", "npz"), preview: int = 8
    ) -> None:
        super().__init__("batch")
        if preview < 0:
            raise ValueError(f"preview is {preview}, but must be 0 (none) or positive.")
        self.dirpath, self.preview = dirpath, preview
        self.formats: tuple[str, ...] = tuple(formats) if not isinstance(formats, str) else (formats,)
        ProtectedStore(Path("/nonexistent"), "", self.formats, {"norm": "inf", "value": 0})  # checks the names
        self.store: ProtectedStore | None = None
        self._examples: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that protects nothing, and a folder that holds something else."""
        if stage != "predict":
            return
        protection = getattr(pl_module, "protection", None)
        if protection is None or not all(hasattr(protection, name) for name in ("describe", "bound", "fingerprint")):
            raise ValueError(
                f"ProtectedWriter writes what a protection predicts, {type(pl_module).__name__} has no `protection`."
            )
        self.store = None
        self._examples = []
        source = [
            str(getattr(getattr(getattr(trainer, "datamodule", None), name, None), "fingerprint", str)())
            for name in ("train_set", "predict_set")
        ]
        if any(source) or not hasattr(pl_module, "data_fingerprint"):
            self._open(trainer, pl_module, source)

    def _open(self, trainer: Trainer, pl_module: LightningModule, source: list[str]) -> None:
        folder = Path(self.dirpath) if self.dirpath is not None else run_folder(trainer) / "protected"
        protection: Any = pl_module.protection
        settings = f"{protection.fingerprint()} {trainer.precision} {sorted(self.formats)}"
        digest = hashlib.sha256(settings.encode())
        for name in source:
            digest.update(name.encode() + b"|")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.store = ProtectedStore(folder, digest.hexdigest(), self.formats, protection.bound())

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what an earlier run has finished."""
        if self.store is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # a plain loader's data have no name of their own, and the loader is there only now
            self._open(trainer, pl_module, [pl_module.data_fingerprint()])  # type: ignore[operator]
        if self.store is None:
            return
        # one answer for all ranks, before any of them writes
        own = self.store.finished() if trainer.is_global_zero else torch.empty(0)
        finished = trainer.strategy.broadcast(own, src=0)
        if len(finished):
            rank_zero_info(f"ProtectedWriter: {len(finished)} images of '{self.store.folder}' are finished already.")
            if callable(skip := getattr(pl_module, "skip", None)):
                skip(finished)

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
        """Keep a batch."""
        if self.store is None:
            return
        missing = [name for name in ("index", "image", "label") if not isinstance((prediction or {}).get(name), Tensor)]
        if missing:
            raise ValueError(f"ProtectedWriter needs {type(pl_module).__name__}.predict_step to return {missing[0]!r}.")
        index = prediction["index"]
        keep = index != PADDING_INDEX
        index, image, label = index[keep], prediction["image"][keep], prediction["label"][keep]
        if not len(index):
            return
        clean = _clean_rows(as_batch(batch), index)
        self.store.add(index, label, clean, image)
        if sum(len(part["index"]) for part in self._examples) < self.preview and trainer.is_global_zero:
            rows = {"index": index, "label": label, "clean": clean, "protected": image}
            self._examples.append({name: value[: self.preview].cpu() for name, value in rows.items()})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and verify the files on rank 0, once all ranks are done."""
        if self.store is None:
            return
        trainer.strategy.barrier("ProtectedWriter")
        problem: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._finish(trainer, pl_module)
            except (ValueError, OSError) as error:
                problem = error  # it must reach the ranks that wait
        problem = trainer.strategy.broadcast(problem, src=0)
        if problem is not None:
            raise problem

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        store, protection = self.store, pl_module.protection
        assert store is not None
        new = not store.manifest
        datamodule: Any = getattr(trainer, "datamodule", None)
        predict_set = getattr(datamodule, "predict_set", None)
        whole = not _limited(trainer)
        manifest = store.finish(
            getattr(predict_set, "classes", None),
            about={"method": json.loads(json.dumps(protection.describe(), default=str))},  # type: ignore[union-attr,operator]
            expected=len(predict_set) if predict_set is not None and whole else None,
        )
        if new and self._examples and self.preview:
            self._draw(store, manifest, predict_set)
        verified = manifest["verified"]
        rank_zero_info(
            f"ProtectedWriter: {manifest['images']} images in '{store.folder}', read back and compared; largest change "
            f"{verified['largest']:g} ({manifest['bound']['norm']}), allowed {verified['allowed']:g}."
        )

    def _draw(self, store: ProtectedStore, manifest: dict[str, Any], predict_set: Any) -> None:
        columns = {name: torch.cat([part[name] for part in self._examples]) for name in self._examples[0]}
        if predict_set is not None:
            # spread over the data set, rather than the first ones; as the files hold them
            protected = read_protected(store.folder)
            rows = preview_rows(len(predict_set), self.preview)
            rows = rows[torch.isin(predict_set.indices[rows], protected.indices)]
            columns = {"clean": predict_set.read(predict_set.rows[rows]), "label": predict_set.labels[rows]}
            columns["protected"] = protected.images[torch.searchsorted(protected.indices, predict_set.indices[rows])]
        names = [manifest["classes"][label] for label in columns["label"].tolist()]
        images = {name: columns[name][: self.preview] for name in ("clean", "protected")}
        figure = draw_protection(**images, names=names[: self.preview], title=str(manifest["method"].get("method", "")))
        with atomic_write(store.folder / "preview.png") as temporary, temporary.open("wb") as file:
            figure.savefig(file, format="png")


def _limited(trainer: Trainer) -> bool:
    limit = trainer.limit_predict_batches
    return not (limit == 1.0 and isinstance(limit, float)) and not math.isinf(limit)


def _clean_rows(batch: dict[str, Any], index: Tensor) -> Tensor:
    """The clean images (b, C, H, W) uint8 of the batch that belong to some indices."""
    image = batch["image"]
    image = image if image.dtype is torch.uint8 else (image.detach().float() * 255).round().to(torch.uint8)
    if "index" in batch:
        place = {number: row for row, number in enumerate(batch["index"].tolist())}
        return image[torch.tensor([place[number] for number in index.tolist()], device=image.device)]
    if len(image) != len(index):
        raise ValueError("ProtectedWriter needs batches with an 'index' (B,) to find the clean images.")
    return image
