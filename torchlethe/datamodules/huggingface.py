"""Image data sets of the Hugging Face hub, in parquet files or in folders, through the `datasets` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from torchlethe.arguments import check_within
from torchlethe.data.augmentation import Augmentation
from torchlethe.data.images import ImageDataset
from torchlethe.data.splits import stratified
from torchlethe.data.streaming import ColumnImages
from torchlethe.datamodules.base import ImageDataModule, Split

_IMAGE_NAMES = ("image", "img", "pixel_values", "picture", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "cls", "y")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            "parquet files and hub data sets need the datasets library, install it with: "
            "pip install 'torchlethe[datasets]'"
        ) from error
    return datasets


def open_splits(path: str | Path, name: str | None = None) -> Any:
    """Open a data set by its hub name, a parquet file, a folder of parquet files or a folder of images.

    Args:
        path: Local path or hub name.
        name: Configuration of a hub data set.

    Returns:
        A ``datasets.DatasetDict``. Parquet files are sorted into splits by the beginning of their names.

    Raises:
        FileNotFoundError: If there is no such data, in one sentence.
        ModuleNotFoundError: If the ``datasets`` library is not installed.
    """
    load_dataset = _library().load_dataset
    local = Path(path).expanduser()
    if local.is_file():
        return load_dataset("parquet", data_files={"train": str(local)})
    if local.is_dir():
        files = sorted(local.rglob("*.parquet"))
        if not files:
            return load_dataset("imagefolder", data_dir=str(local))
        names = ("train", "test", "validation", "valid", "val")
        groups: dict[str, list[str]] = {}
        for file in files:
            split = next((split for split in names if file.stem.lower().startswith(split)), "train")
            groups.setdefault(split, []).append(str(file))
        return load_dataset("parquet", data_files=groups)
    if (
        local.suffix == ".parquet"
        or local.is_absolute()
        or str(path).startswith((".", "~"))
        or str(path).count("/") > 1
    ):
        raise FileNotFoundError(f"path is {str(path)!r}, but there is no such file or folder.")
    try:
        return load_dataset(str(path), name)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"path is {str(path)!r}, but it is no local path and the hub says: {reason}."
        ) from error


def _find(dataset: Any, wanted: str | None, argument: str, names: tuple[str, ...], kind: type) -> str:
    columns = list(dataset.column_names)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{argument} is {wanted!r}, but the columns are {', '.join(columns)}.")
        return wanted
    typed = [column for column in columns if isinstance(dataset.features[column], kind)]
    named = [column for column in names if column in columns]
    if found := [column for column in named if column in typed] or typed or named:
        return found[0]
    raise ValueError(f"{argument} cannot be told from the columns {', '.join(columns)}; name it.")


def parse_columns(
    dataset: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    channels: int | None = None,
) -> ColumnImages:
    """Find images and labels in the columns of a data set.

    Args:
        dataset: A ``datasets.Dataset``.
        image_column: Name of the image column; found by type, then by name, if None.
        label_column: Name of the label column; likewise.
        image_size: Side of the images; None keeps the stored size.
        resize: Length of the shorter side before the centre crop; ``image_size`` by default.
        channels: 1 or 3; that of the first image by default.

    Returns:
        The images, decoded when read.

    Raises:
        ValueError: If a column is missing or does not hold what it should.
    """
    from PIL import Image

    datasets = _library()
    image_column = _find(dataset, image_column, "image_column", _IMAGE_NAMES, datasets.Image)
    label_column = _find(dataset, label_column, "label_column", _LABEL_NAMES, datasets.ClassLabel)
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    values = dataset.with_format("arrow")[:][label_column].to_pylist()
    feature, names = dataset.features[label_column], None
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif values and isinstance(values[0], str):
        names = sorted(set(values))
        number = {name: label for label, name in enumerate(names)}
        values = [number[value] for value in values]
    if any(not isinstance(value, int) or value < 0 for value in values):
        raise ValueError(f"label_column is {label_column!r}, but its entries are not class numbers or names.")
    images = ColumnImages(
        dataset.select_columns([image_column]), image_column, values, size=image_size, resize=resize, classes=names
    )
    if channels is None:
        import io

        first = images.sources(images.rows[:1])[0]
        with Image.open(io.BytesIO(first) if isinstance(first, bytes) else first) as image:
            channels = 1 if image.mode in ("1", "L", "I;16") else 3
    images.channels = channels
    return images


class HuggingFaceDataModule(ImageDataModule):
    """Any image classification data set that the ``datasets`` library opens.

    Args:
        path: Name on the hub (``"uoft-cs/cifar10"``), a parquet file, or a folder of parquet files (``train*.parquet``,
            ``test*.parquet``) or of images.
        name: Configuration of a hub data set.
        train_split: Split to train on; when it is missing and there is only one, that one.
        test_split: Split to test on; ``test``, ``validation`` or ``val`` by default. When there is none, ``test_size``
            of the training split is held out.
        test_size: Share held out for testing when there is no test split; stratified, by ``split_seed``.
        image_column: Column of the images; found by itself.
        label_column: Column of the labels; found by itself.
        image_size: Side of the images after a centre crop; None keeps the stored size, which must be the same for all.
        resize: Length of the shorter side before the crop; ``image_size`` by default.
        channels: 1 or 3; that of the first image by default.
        in_memory: Decode everything once, in threads; False decodes in worker processes as training goes (big images):
            set ``num_workers``.
        cache_dir: With ``in_memory``, folder for a file of decoded images that the next run reads instead.
        **kwargs: Arguments of :class:`ImageDataModule`. Default augmentation: crop with 4 pixels of padding, and flip.
    """

    default_augmentation = Augmentation(crop=4, flip=True)

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        test_size: float = 0.2,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        channels: int | None = None,
        in_memory: bool = True,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_within(0, 1, "()", test_size=test_size)
        self.path, self.name, self.train_split, self.test_split = path, name, train_split, test_split
        self.test_size, self.in_memory, self.cache_dir = test_size, in_memory, cache_dir
        self._columns = (image_column, label_column, image_size, resize, channels)
        self._splits: Any = None
        self._loaded: dict[str, ImageDataset] = {}

    def prepare_data(self) -> None:
        """Download in one process."""
        self._splits = open_splits(self.path, self.name)

    def _open(self, split: str) -> ImageDataset:
        if split not in self._loaded:
            images = parse_columns(self._splits[split], *self._columns)
            self._loaded[split] = images.in_memory(self.cache_dir) if self.in_memory else images
        return self._loaded[split]

    @override
    def load(self, split: Split) -> ImageDataset:
        if self._splits is None:
            self._splits = open_splits(self.path, self.name)
        found = list(self._splits)
        train = found[0] if self.train_split not in found and len(found) == 1 else self.train_split
        test = self.test_split or next(
            (s for s in ("test", "validation", "valid", "val") if s in found and s != train), None
        )
        for argument, wanted in (("train_split", train), ("test_split", test)):
            if wanted is not None and wanted not in found:
                raise ValueError(f"{argument} is {wanted!r}, but the data set has {', '.join(found)}.")
        whole = self._open(train)
        self.num_classes = len(whole.classes)
        if test is not None:
            return whole if split == "train" else self._open(test)
        held_out = torch.zeros(len(whole), dtype=torch.bool)
        held_out[stratified(whole.labels, round(self.test_size * len(whole)), self.split_seed)] = True
        return whole.subset(held_out if split == "test" else ~held_out)
