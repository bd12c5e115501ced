"""CIFAR-10, CIFAR-100 and SVHN from torchvision's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from typing_extensions import override

from torchlethe.data.augmentation import Augmentation
from torchlethe.data.images import InMemoryImages
from torchlethe.datamodules.base import ImageDataModule, Split


def _open(name: str, root: Path, download: bool, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except RuntimeError as error:
        hint = "the download failed" if download else "set download=True or put the official files there"
        raise FileNotFoundError(f"root is {str(root)!r}, but {name} is not there (or damaged); {hint}.") from error


class _TorchvisionDataModule(ImageDataModule):
    default_augmentation = Augmentation(crop=4, flip=True)

    def __init__(self, root: str | Path = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root).expanduser(), download

    def prepare_data(self) -> None:
        """Download in one process, where asked to."""
        if self.download:
            for split in ("train", "test"):
                self.load(split)


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50 000 + 10 000 colour images of 32×32 pixels in 10 classes (Krizhevsky, 2009).

    Args:
        root: Folder with torchvision's files (``cifar-10-batches-py``), or with the data set's parquet files
            (``train*.parquet`` and ``test*.parquet``).
        download: Download to ``root`` if missing.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 4 pixels of padding, and flip.
    """

    num_classes = 10

    @override
    def load(self, split: Split) -> InMemoryImages:
        if any(self.root.glob("*.parquet")):
            from torchlethe.datamodules.huggingface import open_splits, parse_columns

            return parse_columns(open_splits(self.root)[split]).in_memory()
        found = _open(
            "CIFAR-10",
            self.root,
            self.download,
            lambda: datasets.CIFAR10(self.root, split == "train", download=self.download),
        )
        return InMemoryImages(
            torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), found.targets, None, found.classes
        )


# Class number in CIFAR-100 to the number of its superclass, both in the official (alphabetical) order.
_SUPERCLASS = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
)  # fmt: skip
_SUPERCLASS_NAMES = [
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
]


class CIFAR100DataModule(_TorchvisionDataModule):
    """CIFAR-100: 50 000 + 10 000 colour images of 32×32 pixels in 100 classes (Krizhevsky, 2009).

    Args:
        root: Folder with torchvision's files (``cifar-100-python``).
        download: Download to ``root`` if missing.
        coarse: Train on the 20 superclasses; the 100 classes are then subclasses, for ``ForgetSubclasses``.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 4 pixels of padding, and flip.
    """

    num_classes = 100

    def __init__(self, root: str | Path = "data", download: bool = False, coarse: bool = False, **kwargs: Any) -> None:
        super().__init__(root, download, **kwargs)
        self.coarse = coarse
        self.num_classes = 20 if coarse else 100

    @override
    def load(self, split: Split) -> InMemoryImages:
        found = _open(
            "CIFAR-100",
            self.root,
            self.download,
            lambda: datasets.CIFAR100(self.root, split == "train", download=self.download),
        )
        images, fine = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)
        if self.coarse:
            return InMemoryImages(images, torch.tensor(_SUPERCLASS)[fine], None, _SUPERCLASS_NAMES, fine, found.classes)
        return InMemoryImages(images, fine, None, found.classes)


class SVHNDataModule(_TorchvisionDataModule):
    """SVHN: 73 257 + 26 032 cropped house numbers, colour, 32×32 pixels, in 10 classes (Netzer et al., 2011).

    Args:
        root: Folder with the official files ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Download to ``root`` if missing.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 4 pixels of padding; digits are
            not mirrored.
    """

    num_classes = 10
    default_augmentation = Augmentation(crop=4, flip=False)

    @override
    def load(self, split: Split) -> InMemoryImages:
        found = _open(
            "SVHN", self.root, self.download, lambda: datasets.SVHN(str(self.root), split, download=self.download)
        )
        return InMemoryImages(torch.from_numpy(found.data), torch.from_numpy(found.labels).long())
