"""The Lightning shell of every protection: ``predict`` hands it clean images and gets protected ones back."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from torchlethe.components import all_reduce_sum, gradients_on
from torchlethe.data import PADDING_INDEX, as_batch
from torchlethe.data.loaders import PositionedLoader
from torchlethe.io import atomic_write
from torchlethe.updates.protection import Protection
from torchlethe.updates.protection.snapshots import LAYOUT, Snapshots


class ProtectionModule(LightningModule):
    """Run a protection under Lightning: a method's module is this class with typed arguments.

    ``predict`` first lets the protection prepare on the training set of the datamodule (of any datamodule with a
    ``train_set``; otherwise on the batches of the predict loader), then protects the batches of the predict loader.
    Images are uint8, or floating in [0, 1] on the grid of 1/255, as Lethe's datamodules hand them over.

    Args:
        protection: the method.
        cache_dir: folder for the outcome of the preparation, which a later run with the same settings, networks and
            data reads in place of repeating it; by default ``prepared`` in the Trainer's ``default_root_dir``. A long
            preparation leaves a snapshot there every minute, from which the next run goes on if this one is killed.
        cache: whether to keep outcome and snapshots at all.

    Attributes:
        report: after a ``predict``, numbers over all images protected in it, on all ranks: what the protection notes
            about them, and ``changed_max``, ``changed_mean`` (|change| of a value, in units of 1/255), ``at_radius``
            (share of values changed by the whole radius) and ``psnr`` (decibels, mean over images).

    Raises:
        ValueError: the images are no bytes and not on the grid of 1/255, a label is out of range, or a loader without
            ``index`` shuffles.

    Note:
        Under DDP each rank protects its share of the images; no gradients are exchanged. Preparations that are sums
        over the data are computed on shares and summed over ranks, others are computed by every rank, and rank 0's
        outcome is used by all. Padding is left out of the results.
    """

    def __init__(self, protection: Protection, cache_dir: str | Path | None = None, cache: bool = True) -> None:
        super().__init__()
        self.protection = protection
        self.networks = nn.ModuleDict(protection.networks)
        self.cache_dir, self.cache = cache_dir, cache
        self.report: dict[str, float] = {}
        self._finished: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @classmethod
    def needs_weights(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether the method asks a trained network, so that one with random weights would be a mistake.

        Args:
            arguments: the constructor's, as far as they are given; the command line asks before it makes the module.
        """
        return "weights" in inspect.signature(cls).parameters

    def forward(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Protect images: see :meth:`torchlethe.updates.protection.Protection.protect`."""
        return self.protection.protect(image, label, index)

    def configure_optimizers(self) -> None:
        """None: nothing is trained here."""

    def skip(self, indices: Tensor) -> None:
        """Leave images out of the coming batches, as they are finished already.

        A writer calls this in its ``on_predict_start`` to go on where a killed run stopped.

        Args:
            indices: (M,) int64 positions in the data set.
        """
        self._finished = indices.long().to(self.device)

    def setup(self, stage: str) -> None:
        """Refuse to fit: protections are run with ``predict``."""
        if stage != "predict":
            raise ValueError(f"{type(self).__name__} protects data, it runs with `predict`, not with `{stage}`.")
        labels = getattr(getattr(getattr(self.trainer, "datamodule", None), "train_set", None), "labels", None)
        if isinstance(labels, Tensor):
            self._check_labels(labels)
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "64-true", "bf16-mixed"):
            # half the bits lose the bytes of an image; fp16 loses small gradients as well
            raise ValueError(f"precision is {precision}, {type(self).__name__} needs 32-true, 64-true or bf16-mixed.")

    def _check_labels(self, label: Tensor) -> None:
        count = getattr(self.protection, "num_classes", None)
        if count is not None and len(label) and int(label.max()) >= count:
            raise ValueError(f"the data has the label {int(label.max())}, but num_classes is {count}.")

    def on_predict_start(self) -> None:
        """Prepare, or read what an earlier run prepared."""
        self.networks.eval()
        self._sums, self.report = {}, {}
        path = self._cache_file() if self.cache and self.protection.prepares else None
        state = self._read(path)
        if state is None:
            state = self._prepare(path)
        with torch.inference_mode(False):
            self.protection.load_state_dict(state)
            self.protection.to(self.device)

    def _read(self, path: Path | None) -> Any:
        """What rank 0 finds in a file, on every rank; None where there is none."""
        state: Any = None
        with torch.inference_mode(False):  # an optimizer cannot go on with inference tensors
            if path is not None and self.trainer.is_global_zero and path.is_file():
                state = torch.load(path, map_location="cpu", weights_only=True)
            return self.trainer.strategy.broadcast(state)

    def _prepare(self, path: Path | None) -> Any:
        """Prepare, from a killed run's last snapshot if there is one; rank 0 keeps the outcome."""
        begun = None if path is None else path.with_suffix(f".begun{LAYOUT}.pt")
        writes = self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        found = self._read(begun)
        if found is not None:
            rank_zero_info(f"{type(self).__name__} goes on with the preparation that '{begun}' holds.")
        self.protection.snapshots = Snapshots(found, partial(_write, begun) if begun and writes else None)
        try:
            with gradients_on(), self.trainer.precision_plugin.forward_context():
                batches = PreparationBatches(self, self.protection.shards)
                shared = self.trainer.world_size > 1 and self.protection.shards
                logs = self.protection.prepare(batches, device=self.device, reduce=all_reduce_sum if shared else None)
        finally:
            self.protection.snapshots = Snapshots()
        if self.logger is not None and logs:
            self.logger.log_metrics(logs)
        state = self.protection.state_dict()
        if path is not None and begun is not None and writes:
            _write(path, state)
            begun.unlink(missing_ok=True)
        return self.trainer.strategy.broadcast(state)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Protect a batch.

        Returns:
            ``index`` (b,), ``image`` (b, C, H, W) uint8 and ``label`` (b,), without padding and without the images
            that :meth:`skip` named, so b may be 0.
        """
        with gradients_on():
            clean = self.clean_batch(batch, batch_idx)
            keep = clean["index"] != PADDING_INDEX
            if self._finished is not None:
                keep &= ~torch.isin(clean["index"], self._finished)
            clean = {name: value[keep] for name, value in clean.items()}
            if not len(clean["index"]):
                return clean
            image = self.protection.protect(clean["image"], clean["label"], clean["index"])
            self._note(clean["image"], image)
        return {**clean, "image": image}

    def clean_batch(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """``image`` uint8, ``label`` and ``index`` of a batch of any origin; padding has the index -1.

        Batches without ``index`` are counted in the order of this process.
        """
        batch = as_batch(batch)
        image = pixels(batch["image"])
        label = torch.as_tensor(batch["label"], device=image.device)
        if label.shape != image.shape[:1] or label.is_floating_point():
            raise ValueError(
                f"label is {label.dtype} {tuple(label.shape)}, but must hold a whole class number for each of the "
                f"{len(image)} images."
            )
        label = label.long().clone()
        if "index" in batch:
            index = batch["index"].long().clone()
        elif self.trainer.world_size == 1:
            if _shuffled(self.trainer.predict_dataloaders):
                raise ValueError(
                    f"the loader that {type(self).__name__} predicts on shuffles, and its batches have no 'index' (B,) "
                    "that says which image is which: take one with shuffle=False."
                )
            index = torch.arange(len(image), device=image.device) + self._counted(batch_idx, len(image))
        else:
            raise ValueError("protecting on several ranks needs batches with an 'index' (B,).")
        return {"index": index, "image": image, "label": label}

    _seen = 0

    def _counted(self, batch_idx: int, size: int) -> int:
        start = self._seen if batch_idx else 0
        self._seen = start + size
        return start

    def on_predict_end(self) -> None:
        """Sum up what was noted about the images."""
        count = all_reduce_sum(self._sums.pop("count", torch.zeros((), dtype=torch.float64, device=self.device)))
        largest = self._sums.pop("changed_max", torch.zeros((), dtype=torch.float64, device=self.device))
        names = sorted(self._sums)
        if self.trainer.world_size > 1:
            # a rank whose images were all finished before has noted nothing
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, names)
            names = sorted(set().union(*gathered))
            largest = self.trainer.strategy.all_gather(largest).max()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = {name: all_reduce_sum(self._sums.get(name, zero)) for name in names}
        if count:
            self.report = {name: float(value / count) for name, value in sums.items()}
            self.report["changed_max"] = float(largest)
            self.report["images"] = int(count)
            if not largest:
                rank_zero_warn(
                    f"{type(self).__name__} changed no pixel: are radius and step in units of 1/255, 8 and not 8/255?"
                )
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(self.report.items()))
            rank_zero_info(f"{type(self).__name__}: {numbers}")
            if self.logger is not None:
                self.logger.log_metrics({f"protection_{name}": value for name, value in self.report.items()})

    def _note(self, clean: Tensor, image: Tensor) -> None:
        change = (image.to(torch.int16) - clean.to(torch.int16)).abs().flatten(1)
        values: dict[str, Tensor] = dict(self.protection.notes)
        values["changed_mean"] = change.double().mean(1)
        error = change.double().square().mean(1).clamp_min(1e-12)
        values["psnr"] = 10 * torch.log10(255**2 / error).clamp_max(20)
        if self.protection.radius is not None:
            values["at_radius"] = (change >= self.protection.radius).double().mean(1)
        sums = {name: value.double().sum() for name, value in values.items()}
        sums["count"] = torch.full((), float(len(image)), dtype=torch.float64, device=image.device)
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        largest = change.max().double()
        self._sums["changed_max"] = torch.maximum(self._sums.get("changed_max", largest), largest)

    def _cache_file(self) -> Path:
        folder = (
            Path(self.cache_dir) if self.cache_dir is not None else Path(self.trainer.default_root_dir) / "prepared"
        )
        about = f"{self.protection.preparation_fingerprint()} {self.trainer.precision} {self.data_fingerprint()}"
        key = hashlib.sha256(about.encode()).hexdigest()
        return folder / f"{type(self.protection).__name__}-{key[:16]}.pt"

    def data_fingerprint(self) -> str:
        """Hexadecimal digits of the data of this run; those of a plain loader are read once for it, by all ranks."""
        dataset = getattr(getattr(self.trainer, "datamodule", None), "train_set", None)
        if dataset is not None and hasattr(dataset, "fingerprint"):
            return dataset.fingerprint()
        digest = hashlib.sha256()
        for batch in PreparationBatches(self, shards=True):
            self._check_labels(batch["label"])
            for name in ("image", "label", "index"):
                digest.update(batch[name].cpu().numpy().tobytes())
        found: list[Any] = [digest.hexdigest()]
        if self.trainer.world_size > 1:
            found = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(found, digest.hexdigest())
        return " ".join(found)


def _write(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


class PreparationBatches:
    """The batches that a protection prepares on: in order, without augmentation and padding, uint8, on the device.

    Args:
        module: the running module.
        shards: whether each rank gets its part, rather than everything.
    """

    def __init__(self, module: ProtectionModule, shards: bool) -> None:
        self.module = module
        trainer = module.trainer
        datamodule: Any = getattr(trainer, "datamodule", None)
        dataset = getattr(datamodule, "train_set", None)
        if dataset is not None and hasattr(datamodule, "eval_batch_size"):
            settings: dict[str, Any] = {} if shards else {"num_replicas": 1, "rank": 0}
            if shards:
                settings = trainer.distributed_sampler_kwargs or {}
            self.loader: Any = PositionedLoader(dataset, batch_size=datamodule.eval_batch_size, **settings)
        elif trainer.world_size > 1 and not shards:
            raise ValueError(
                f"{type(module).__name__} prepares on all of the data on every rank: use a datamodule with a train_set."
            )
        else:
            loaders: Any = trainer.predict_dataloaders
            self.loader = apart(loaders[0] if isinstance(loaders, list) else loaders)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch_idx, batch in enumerate(self.loader):
            moved = self.module.trainer.strategy.batch_to_device(dict(as_batch(batch)))
            clean = self.module.clean_batch(moved, batch_idx)
            keep = clean["index"] != PADDING_INDEX
            yield clean if bool(keep.all()) else {name: value[keep] for name, value in clean.items()}


def _shuffled(loader: Any) -> bool:
    loader = loader[0] if isinstance(loader, list) and loader else loader
    # Lightning hands batch samplers over, and the sampler of such a loader is not the one that is used
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)


def apart(loader: Any) -> Any:
    """A stock loader's batches in a loader of their own.

    Lightning has begun to iterate the loader that it predicts on when a module's hooks run, and to iterate it a second
    time in between would end its pass.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    # Lightning's own batch sampler around the stock one, which holds a single iterator, copies its attributes
    if not isinstance(loader, DataLoader) or not hasattr(batches, "sampler"):
        return loader
    batches = BatchSampler(batches.sampler, batches.batch_size, batches.drop_last)
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)


def pixels(image: Tensor) -> Tensor:
    """Bytes of images that are uint8, or floating in [0, 1] on the grid of 1/255.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, C, H, W) uint8, a copy.

    Raises:
        ValueError: the values lie elsewhere (normalised, resized or augmented images, or half precision).
    """
    if image.ndim != 4:
        raise ValueError(f"image has the shape {tuple(image.shape)}, but must be (B, C, H, W).")
    if image.dtype is torch.uint8:
        return image.clone()
    scaled = image.detach() * 255 if image.is_floating_point() else image.float()
    exact = scaled.round()
    if image.dtype in (torch.float16, torch.bfloat16) or not bool(
        ((scaled - exact).abs() < 1e-2).all() & (exact >= 0).all() & (exact <= 255).all()
    ):
        raise ValueError(
            f"image is {image.dtype} off the grid of 1/255 in [0, 1]: data to protect must be as it is stored, neither "
            "normalised nor augmented, and not in half precision."
        )
    return exact.to(torch.uint8)
