"""The base of all image datamodules: splits, loaders and batched augmentation; a subclass only loads."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.data.augmentation import Augmentation
from torchlethe.data.batches import as_batch, unit_range
from torchlethe.data.images import ImageDataset
from torchlethe.data.label_noise import LabelNoise
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.splits import class_balanced, stratified

Split = Literal["train", "test"]


def loader_settings(datamodule: LightningDataModule, num_workers: int) -> dict[str, Any]:
    """Rank, number of ranks and memory pinning for a loader of a datamodule, from its trainer where it has one."""
    settings: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if (trainer := datamodule.trainer) is not None:
        # not world_size: under tensor parallelism several devices read the same data
        settings.update(trainer.distributed_sampler_kwargs or {})
        settings["pin_memory"] = trainer.strategy.root_device.type == "cuda"
    return settings


class ImageDataModule(LightningDataModule):
    """Base of the image datamodules.

    Batches are dicts of ``image``, ``label`` and ``index`` (position in the original training set, kept through every
    split). Images travel as uint8; on the device they become float32 in [0, 1], training batches after augmentation.
    Normalisation belongs to the model. Under DDP each rank reads its share of every global batch, in the order that one
    process would use; evaluation marks its padding duplicates with the label -100 and the index -1.

    A subclass sets :attr:`num_classes` and implements :meth:`load`.

    Args:
        batch_size: Training samples per batch and rank.
        eval_batch_size: Evaluation samples per batch and rank; ``batch_size`` by default.
        num_workers: Loader processes; 0 is fastest for data in memory.
        seed: Seed of training order and augmentation.
        validation: Part of the training set held out, as a share in (0, 1) or a count; stratified. 0 for none.
        split_seed: Seed of ``validation`` and ``subset``.
        drop_classes: Classes to leave out of training, validation and test; the other labels keep their numbers.
        subset: Keep this many training samples (validation included), equally many of each class.
        label_noise: Noise on the training labels; ``train_set.clean_labels`` keeps the true ones.
        augmentation: Augmentation of training batches, ``"default"`` for the data set's usual one, None for none.
        drop_last: Drop the last short training batch.
        input_size: Side to which images are resized on the device, after augmentation (bicubic), for networks made for
            larger images; None keeps the size.

    Attributes:
        train_set: Training samples, after :meth:`setup`.
        validation_set: Validation samples, or None.
        test_set: Test samples.
        num_classes: Number of classes.
        classes: Names of the classes, after :meth:`setup`.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_classes: int
    default_augmentation: ClassVar[Augmentation | None] = None

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        validation: float = 0.0,
        split_seed: int = 0,
        drop_classes: list[int] | None = None,
        subset: int | None = None,
        label_noise: LabelNoise | None = None,
        augmentation: Augmentation | Literal["default"] | None = "default",
        drop_last: bool = False,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "input_size": input_size}
        check_at_least(1, **{name: size for name, size in sizes.items() if size is not None})
        if validation < 0 or (validation >= 1 and validation != int(validation)):
            raise ValueError(f"validation is {validation}, but must be a share below 1 or a whole number of samples.")
        if isinstance(augmentation, str) and augmentation != "default":
            raise ValueError(f"augmentation is {augmentation!r}, but must be an Augmentation, 'default' or None.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.drop_last = num_workers, seed, drop_last
        self.validation, self.split_seed, self.subset = validation, split_seed, subset
        self.drop_classes = list(drop_classes or ())
        self.label_noise, self.input_size = label_noise, input_size
        self.augmentation = self.default_augmentation if augmentation == "default" else augmentation
        self.train_set: ImageDataset | None = None
        self.validation_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    def load(self, split: Split) -> ImageDataset:
        """Load the whole training or test set.

        Args:
            split: ``"train"`` or ``"test"``.

        Raises:
            FileNotFoundError: If the data is not there, with one sentence that says what to do.
        """
        raise NotImplementedError

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._ready(self.test_set).classes

    def setup(self, stage: str | None = None) -> None:
        """Load and split, once; every stage gets all sets, since unlearning is judged on all of them."""
        if self.train_set is not None:
            return
        train, test = self._without_dropped(self.load("train")), self._without_dropped(self.load("test"))
        if self.subset is not None:
            train = train.subset(class_balanced(train.labels, self.subset, self.split_seed))
        if self.validation:
            count = round(self.validation * len(train)) if self.validation < 1 else int(self.validation)
            if not 0 < count < len(train):
                raise ValueError(f"validation is {self.validation}, but the training set has {len(train)} samples.")
            held_out = torch.zeros(len(train), dtype=torch.bool)
            held_out[stratified(train.labels, count, self.split_seed)] = True
            self.validation_set, train = train.subset(held_out), train.subset(~held_out)
        if self.label_noise is not None:
            train = train.with_labels(self.label_noise(train.labels, len(train.classes)))
        self.train_set, self.test_set = train, test

    def _without_dropped(self, dataset: ImageDataset) -> ImageDataset:
        if not self.drop_classes:
            return dataset
        if bad := [number for number in self.drop_classes if not 0 <= number < len(dataset.classes)]:
            raise ValueError(f"drop_classes contains {bad[0]}, but classes are 0…{len(dataset.classes) - 1}.")
        kept = dataset.subset(~torch.isin(dataset.labels, torch.tensor(self.drop_classes)))
        if not len(kept):
            raise ValueError(f"drop_classes is {self.drop_classes}, but some class must be left.")
        return kept

    @staticmethod
    def _ready(dataset: ImageDataset | None) -> ImageDataset:
        if dataset is None:
            raise RuntimeError("data is loaded by `setup()`, which was not called yet.")
        return dataset

    def eval_loader(self, dataset: ImageDataset) -> PositionedLoader:
        """A loader in stored order, without augmentation, for any data set of this module."""
        return PositionedLoader(dataset, batch_size=self.eval_batch_size, **loader_settings(self, self.num_workers))

    def train_dataloader(self) -> PositionedLoader:
        """Shuffled training batches, which know their position."""
        return PositionedLoader(
            self._ready(self.train_set),
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            drop_last=self.drop_last,
            **loader_settings(self, self.num_workers),
        )

    def val_dataloader(self) -> PositionedLoader | list[Any]:
        """Validation batches; an empty list where nothing was held out."""
        # Lightning suspects a mistake in an empty list; here it is how validation is left out
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return [] if self.validation_set is None else self.eval_loader(self.validation_set)

    def test_dataloader(self) -> PositionedLoader:
        """Test batches."""
        return self.eval_loader(self._ready(self.test_set))

    def predict_dataloader(self) -> PositionedLoader:
        """Test batches."""
        return self.eval_loader(self._ready(self.test_set))

    def prepare_batch(
        self, batch: Any, device: torch.device | str | None = None, augment: bool = False, seed: int | None = None
    ) -> dict[str, Any]:
        """Do outside of Lightning's loops what these do to a batch: transfer, augment, bring to [0, 1].

        Args:
            batch: A batch, or a dict from role to batch.
            device: Where to move it; it stays where it is by default.
            augment: Augment batches that carry ``epoch`` (training batches do).
            seed: Augmentation seed; the module's by default.

        Returns:
            The batch as a dict; ``image`` (B, C, H, W) float32 in [0, 1].
        """
        if isinstance(batch, dict) and batch and all(isinstance(part, dict) for part in batch.values()):
            return {role: self.prepare_batch(part, device, augment, seed) for role, part in batch.items()}
        batch = dict(as_batch(batch))
        if device is not None:
            batch = {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        image = batch["image"]
        if image.dtype is torch.uint8:
            if augment and self.augmentation is not None and "epoch" in batch:
                key = self.seed if seed is None else seed
                image = self.augmentation(image, batch["index"], batch["epoch"], batch.get("augment"), key)
            image = unit_range(image)
            if self.input_size is not None and image.shape[-2:] != (self.input_size, self.input_size):
                size = (self.input_size, self.input_size)
                image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp_(0, 1)
        batch["image"] = image
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        """Augment training batches and bring images to [0, 1], on the device."""
        return as_input(self, self.prepare_batch(batch, augment=True))


def as_input(datamodule: LightningDataModule, batch: dict[str, Any]) -> dict[str, Any]:
    """Give images the dtype that the trainer's precision wants (Lightning converts before the transfer: too early)."""
    return batch if datamodule.trainer is None else datamodule.trainer.precision_plugin.convert_input(batch)
