"""Images in folders: the layout of ImageNet, and Tiny-ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from torchlethe.arguments import check_at_least
from torchlethe.data.augmentation import Augmentation
from torchlethe.data.images import ImageDataset
from torchlethe.data.streaming import ImageFiles
from torchlethe.datamodules.base import ImageDataModule, Split


class ImageFolderDataModule(ImageDataModule):
    """Images in one folder per class, as ImageNet has them: ``root/train/<class>/*`` and ``root/val/<class>/*``.

    Args:
        root: The folder.
        train_folder: Folder of the training images within it.
        test_folder: Folder of the test images within it; ``test`` or else ``val`` by default.
        image_size: Side of the images after a centre crop.
        resize: Length of the shorter side before the crop; ``image_size`` · 8/7 by default (256 for 224).
        in_memory: Decode everything once (small sets); False decodes in worker processes as training goes: set
            ``num_workers``.
        cache_dir: With ``in_memory``, folder for a file of decoded images that the next run reads instead.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 28 pixels of padding, and flip.
    """

    default_augmentation = Augmentation(crop=28, flip=True)

    def __init__(
        self,
        root: str | Path,
        train_folder: str = "train",
        test_folder: str | None = None,
        image_size: int = 224,
        resize: int | None = None,
        in_memory: bool = False,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(1, image_size=image_size)
        self.root, self.train_folder = Path(root).expanduser(), train_folder
        self.test_folder = test_folder or ("test" if (self.root / "test").is_dir() else "val")
        self.image_size, self.resize = image_size, resize if resize is not None else image_size * 8 // 7
        self.in_memory, self.cache_dir = in_memory, cache_dir
        self._names: list[str] | None = None

    def files(self, split: Split) -> ImageFiles:
        """Find the images of a split."""
        size: dict[str, Any] = {"size": self.image_size, "resize": self.resize}
        if split == "train":
            return ImageFiles.from_folder(self.root / self.train_folder, **size)
        return ImageFiles.from_folder(self.root / self.test_folder, self._names, **size)

    @override
    def load(self, split: Split) -> ImageDataset:
        found = self.files(split)
        if split == "train":
            self._names = found.classes
            self.num_classes = len(found.classes)
        return found.in_memory(self.cache_dir) if self.in_memory else found


class TinyImageNetDataModule(ImageFolderDataModule):
    """Tiny-ImageNet: 100 000 training and 10 000 validation images of 64×64 pixels in 200 classes (Stanford CS231n).

    The official validation images (labels in ``val/val_annotations.txt``) are the test set, since the labels of the
    official test set are not public; ``val/<class>/*`` works too.

    Args:
        root: Folder ``tiny-imagenet-200``.
        image_size: Side of the images in memory; ``input_size`` enlarges them on the device.
        in_memory: Decode everything once (1.4 GB); see :class:`ImageFolderDataModule`.
        cache_dir: Folder for the decoded images, which spares the next run the decoding.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 8 pixels of padding, and flip.
    """

    num_classes = 200
    default_augmentation = Augmentation(crop=8, flip=True)

    def __init__(
        self,
        root: str | Path = "data/tiny-imagenet-200",
        image_size: int = 64,
        in_memory: bool = True,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            test_folder="val",
            image_size=image_size,
            resize=image_size,
            in_memory=in_memory,
            cache_dir=cache_dir,
            **kwargs,
        )

    @override
    def files(self, split: Split) -> ImageFiles:
        if not (self.root / "train").is_dir():
            raise FileNotFoundError(
                f"root is {str(self.root)!r}, but Tiny-ImageNet is not there; "
                "unpack tiny-imagenet-200.zip and name its folder."
            )
        annotations = self.root / "val" / "val_annotations.txt"
        if split == "train" or not annotations.is_file():
            return super().files(split)
        lines = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
        number = {name: label for label, name in enumerate(self._names or [])}
        return ImageFiles(
            self.root / "val" / "images",
            [file for file, _ in lines],
            [number[name] for _, name in lines],
            self.image_size,
            self.resize,
            classes=self._names,
        )
