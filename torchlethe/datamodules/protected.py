"""The two sides of data protection: images to protect, and training on a protected set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import override

from torchlethe.arguments import check_choice, check_within
from torchlethe.data.defences import Defence
from torchlethe.data.forget import ForgetIndices
from torchlethe.data.images import ImageDataset, InMemoryImages
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.protected import (
    ProtectedImages,
    ReplacedImages,
    check_fits,
    choose_protected,
    in_memory,
    read_protected,
)
from torchlethe.datamodules.base import ImageDataModule


class _Wrapping(ImageDataModule):
    """An image datamodule with the sets and settings of another one."""

    def __init__(self, data: ImageDataModule, batch_size: int | None = None) -> None:
        if not isinstance(data, ImageDataModule):
            raise ValueError(
                f"data is a {type(data).__name__}, but must be one of Lethe's image datamodules; other projects read "
                "the files of a protected data set as they read any images."
            )
        super().__init__(
            batch_size=data.batch_size,
            eval_batch_size=batch_size or data.eval_batch_size,
            num_workers=data.num_workers,
            seed=data.seed,
            augmentation=data.augmentation,
            drop_last=data.drop_last,
            input_size=data.input_size,
        )
        self.data = data
        if (classes := getattr(data, "num_classes", None)) is not None:
            self.num_classes = classes

    def prepare_data(self) -> None:
        """Download, if the wrapped module does."""
        self.data.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.data.setup(stage)
        self.num_classes = self.data.num_classes
        self.test_set, self.validation_set = self.data.test_set, self.data.validation_set
        self.train_set = self._train_set(self._ready(self.data.train_set))

    def _train_set(self, clean: ImageDataset) -> ImageDataset:
        return clean


class ProtectionDataModule(_Wrapping):
    """The images to protect: ``predict`` reads the training set of a datamodule in stored order, as stored bytes.

    Neither augmentation nor precision touches the pixels: batches of ``predict`` are uint8. A protection prepares
    (class means, patterns) on the whole training set, :attr:`train_set`, and protects :attr:`predict_set`.

    Args:
        data: the datamodule whose training set is to be protected.
        classes: protect only images of these classes (numbers).
        indices: protect only these images: a list of positions in the training set, or a ``.npy``, ``.json`` or
            ``.txt`` file that holds them.
        batch_size: images of a batch and rank; the evaluation batch size of ``data`` by default.

    Attributes:
        predict_set: the images to protect, after :meth:`setup`.

    Raises:
        ValueError: ``data`` is no image datamodule, or the choice selects nothing.

    Example:
        >>> from torchlethe.datamodules import DigitsDataModule
        >>> data = ProtectionDataModule(DigitsDataModule(), classes=[3])
        >>> data.setup()
        >>> len(data.predict_set), next(iter(data.predict_dataloader()))["image"].dtype
        (122, torch.uint8)
    """

    def __init__(
        self,
        data: ImageDataModule,
        classes: list[int] | None = None,
        indices: str | Path | list[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(data, batch_size)
        self.chosen_classes, self.chosen_indices = classes, indices
        self.predict_set: ImageDataset | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.predict_set is None:
            whole = self._ready(self.train_set)
            indices = None if self.chosen_indices is None else ForgetIndices(self.chosen_indices).indices()
            chosen = choose_protected(whole, whole.indices, classes=self.chosen_classes, indices=indices)
            if not chosen.any():
                raise ValueError(
                    f"classes {self.chosen_classes} and indices {self.chosen_indices} select none of the "
                    f"{len(whole)} training images, but some must be protected."
                )
            self.predict_set = whole.subset(chosen)

    def predict_dataloader(self) -> PositionedLoader:
        """The images to protect, uint8, in stored order."""
        return self.eval_loader(self._ready(self.predict_set))

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        predicting = self.trainer is not None and self.trainer.predicting
        return batch if predicting else super().on_after_batch_transfer(batch, dataloader_idx)


class ProtectedDataModule(_Wrapping):
    """Training on a protected data set, as somebody who took it would; test and validation data stay clean.

    Protected pixels take the place of the clean ones first, then come the defences, then the augmentation of ``data``.

    Args:
        data: the datamodule whose training images were protected.
        protected: what :func:`torchlethe.data.read_protected` reads: the folder of a protected data set, or an
            ``.npz`` file, a parquet file, or a folder of ``<index>.png`` from elsewhere. None trains on clean images
            (with the same defences), for comparison.
        ratio: share of the protected images that is used, in (0, 1]; the other images are clean. The draw depends on
            ``ratio_seed``, and a smaller share is contained in a larger one.
        ratio_seed: seed of that draw.
        classes: use protected images of these classes only.
        indices: use these protected images only, as in :class:`ProtectionDataModule`.
        part: ``all``; ``clean`` leaves out the images that are protected, which is what training on the clean rest
            alone gives; ``protected`` leaves out the clean ones.
        defences: what the appropriator does to every training image, once, before augmentation; see
            :mod:`torchlethe.data.defences`.

    Attributes:
        protected_mask: (N,) bool, which samples of :attr:`train_set` are protected, after :meth:`setup`.
        manifest: what the protected data set says about itself.

    Raises:
        ValueError: an argument is out of range, or the protected images belong to other data.

    Note:
        Images are read into memory when ``data`` holds its own there; otherwise they are read and treated batch by
        batch. Large sets are better trained from their PNG folder by :class:`ImageFolderDataModule`.
    """

    def __init__(
        self,
        data: ImageDataModule,
        protected: str | Path | None = None,
        ratio: float = 1.0,
        ratio_seed: int = 0,
        classes: list[int] | None = None,
        indices: str | Path | list[int] | None = None,
        part: Literal["all", "clean", "protected"] = "all",
        defences: list[Defence] | None = None,
    ) -> None:
        super().__init__(data)
        check_within(0, 1, "(]", ratio=ratio)
        check_choice(("all", "clean", "protected"), part=part)
        self.protected, self.ratio, self.ratio_seed, self.part = protected, ratio, ratio_seed, part
        self.chosen_classes, self.chosen_indices = classes, indices
        self.defences = list(defences or ())
        self.protected_mask = torch.zeros(0, dtype=torch.bool)
        self.manifest: dict[str, Any] = {}

    @override
    def _train_set(self, clean: ImageDataset) -> ImageDataset:
        mask = torch.zeros(len(clean), dtype=torch.bool)
        found: ProtectedImages | None = None
        if self.protected is not None:
            found = read_protected(self.protected)
            check_fits(clean, found)
            indices = None if self.chosen_indices is None else ForgetIndices(self.chosen_indices).indices()
            mask = choose_protected(clean, found.indices, self.ratio, self.chosen_classes, indices, self.ratio_seed)
            self.manifest = found.manifest
        replaced = self._replace(clean, mask, found)
        if self.part != "all":
            keep = mask if self.part == "protected" else ~mask
            if not keep.any():
                raise ValueError(f"part is {self.part!r}, but with these settings no training image is left.")
            replaced, mask = replaced.subset(keep), mask[keep]
        self.protected_mask = mask
        return replaced

    def _replace(self, clean: ImageDataset, mask: torch.Tensor, found: ProtectedImages | None) -> ImageDataset:
        positions = mask.nonzero().flatten()
        if found is None:
            images = torch.empty(0, dtype=torch.uint8)
        else:
            # both are sorted by index before the rows are matched
            images = found.images[torch.searchsorted(found.indices, clean.indices[positions])]
        if found is None and not self.defences:
            return clean
        replaced = ReplacedImages(clean, positions, images, _Treatment(self.defences) if self.defences else None)
        return in_memory(replaced) if isinstance(clean, InMemoryImages) else replaced


class _Treatment:
    """Several defences, one after the other."""

    def __init__(self, defences: list[Defence]) -> None:
        self.defences = defences

    def __repr__(self) -> str:
        return repr(self.defences)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        for defence in self.defences:
            images = defence.apply(images)
        return images
