"""Image sets that are decoded when they are read, and how a small one moves into memory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from torchlethe.data.images import ImageDataset, InMemoryImages

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


def _pixels(source: bytes | str | Path, size: int | None, resize: int | None, channels: int) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    mode, short = "L" if channels == 1 else "RGB", resize or size
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if size is None:
                return np.array(image if image.mode == mode else image.convert(mode))
            assert short is not None
            image.draft(mode, (short, short))  # JPEG: decode no more pixels than are needed
            whole = image.convert(mode)
    except (OSError, SyntaxError) as error:
        name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise ValueError(f"image {name} cannot be decoded: {error}.") from error
    scale = short / min(whole.size)
    wide, high = (max(size, round(side * scale)) for side in whole.size)
    if (wide, high) != whole.size:
        whole = whole.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.array(whole.crop((left, top, left + size, top + size)))


def decode(source: bytes | str | Path, size: int | None = None, resize: int | None = None, channels: int = 3) -> Tensor:
    """Decode an image file to a tensor.

    Args:
        source: The file's content or path.
        size: Side of the centre crop; None keeps the image as it is.
        resize: Length of the shorter side before the crop (bicubic); ``size`` by default.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (channels, H, W) uint8.

    Raises:
        ValueError: If the image cannot be read.
    """
    pixels = torch.from_numpy(_pixels(source, size, resize, channels))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class DecodedImages(ImageDataset):
    """Base of the sets that decode what they read; give their loader worker processes.

    Args:
        labels: (N,) integers.
        size: Side of the images; None keeps what is stored (all must be equal then).
        resize: Length of the shorter side before the centre crop; ``size`` by default.
        channels: 1 for grey, 3 for RGB.
        **kwargs: Arguments of :class:`ImageDataset`.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        size: int | None = None,
        resize: int | None = None,
        channels: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(labels, **kwargs)
        self.size, self.resize, self.channels = size, resize, channels

    def sources(self, rows: Tensor) -> list[Any]:
        """Content or path of the files of some rows."""
        raise NotImplementedError

    @override
    def read(self, rows: Tensor) -> Tensor:
        images = [_pixels(source, self.size, self.resize, self.channels) for source in self.sources(rows)]
        if odd := [image.shape for image in images if image.shape != images[0].shape]:
            raise ValueError(
                f"image_size is None, but the images have different sizes ({images[0].shape[:2]} and {odd[0][:2]}); "
                "set image_size."
            )
        pixels = torch.from_numpy(np.stack(images))
        return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()

    def in_memory(self, cache_dir: str | Path | None = None, threads: int | None = None) -> InMemoryImages:
        """Decode everything once.

        Args:
            cache_dir: Folder for a safetensors file with the decoded images, named by a hash of the data and the size:
                the next call reads that instead.
            threads: Decoding threads; one per core by default.

        Returns:
            The same samples as uint8 tensor.
        """
        key = f"{self.fingerprint()[:32]}-{self.size}-{self.resize}-{self.channels}"
        cache = None if cache_dir is None else Path(cache_dir).expanduser() / f"{key}.safetensors"
        if cache is not None and cache.is_file():
            from safetensors.torch import load_file

            images = load_file(cache)["images"]
        else:
            chunks = self.rows.split(256)
            with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # decoders leave the interpreter lock
                images = torch.cat(list(pool.map(self.read, chunks)))
            if cache is not None:
                from safetensors.torch import save_file

                cache.parent.mkdir(parents=True, exist_ok=True)
                partial = cache.with_suffix(f".{os.getpid()}.partial")
                save_file({"images": images}, partial)
                os.replace(partial, cache)
        return InMemoryImages(images, self.labels, self.indices, self.classes, self.subclasses, self.subclass_names)


class ImageFiles(DecodedImages):
    """Image files on disk, decoded when they are read.

    Args:
        root: Folder that the files lie under.
        files: Paths relative to ``root``.
        labels: (N,) integers.
        size: Side of the images after resizing the shorter side and a centre crop.
        resize: Length of the shorter side before the crop; ``size`` by default.
        **kwargs: Arguments of :class:`DecodedImages`.

    Raises:
        ValueError: If the lengths differ.
    """

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        labels: Tensor | Sequence[int],
        size: int | None = 224,
        resize: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(labels, size, resize, **kwargs)
        if len(files) != len(self.labels):
            raise ValueError(f"files has {len(files)} entries, but labels has {len(self.labels)}.")
        self.root = Path(root)
        # One array of bytes: a list of a million strings would be copied into every worker by reference counting.
        self.files = np.array([os.fsencode(file) for file in files])

    @classmethod
    def from_folder(cls, root: str | Path, classes: Sequence[str] | None = None, **kwargs: Any) -> Self:
        """Find the images of a folder with one sub-folder per class (the layout of ImageNet).

        Args:
            root: The folder; images may lie deeper within a class folder.
            classes: Names of the class folders in label order; the sorted names by default.
            **kwargs: Further arguments of the class.

        Raises:
            FileNotFoundError: If there is no such folder or no image in it.
        """
        root = Path(root)
        folders = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        names = list(classes) if classes is not None else folders
        if unknown := [folder for folder in folders if folder not in names]:
            raise ValueError(
                f"root is {str(root)!r} with the class folder {unknown[0]!r}, which the training set lacks."
            )
        files, labels = [], []
        for label, name in enumerate(names):
            for folder, _, contents in sorted(os.walk(root / name)):
                found = sorted(file for file in contents if file.lower().endswith(EXTENSIONS))
                files += [os.path.relpath(os.path.join(folder, file), root) for file in found]
                labels += [label] * len(found)
        if not files:
            raise FileNotFoundError(
                f"root is {str(root)!r}, but there are no images; put them there in one sub-folder per class."
            )
        return cls(root, files, labels, classes=names, **kwargs)

    @override
    def sources(self, rows: Tensor) -> list[Path]:
        return [self.root / os.fsdecode(file) for file in self.files[rows.numpy()]]

    @override
    def content(self, digest: Any) -> None:
        # Names and sizes stand for the images, so that a million files need not be read.
        for file in self.files[self.rows.numpy()]:
            digest.update(file + b"|%d|" % (self.root / os.fsdecode(file)).stat().st_size)


class ColumnImages(DecodedImages):
    """Encoded images in a column of a Hugging Face data set (memory-mapped Arrow), decoded when they are read.

    Args:
        dataset: A ``datasets.Dataset``.
        column: Name of the image column.
        labels: (N,) integers.
        **kwargs: Arguments of :class:`DecodedImages`.
    """

    def __init__(self, dataset: Any, column: str, labels: Tensor | Sequence[int], **kwargs: Any) -> None:
        super().__init__(labels, **kwargs)
        self.dataset, self.column = dataset, column

    @override
    def sources(self, rows: Tensor) -> list[Any]:
        cells = self.dataset[rows.tolist()][self.column]
        return [cell if isinstance(cell, bytes) else cell["bytes"] or cell["path"] for cell in cells]

    @override
    def content(self, digest: Any) -> None:
        # Some images stand for all: the column may be larger than memory.
        for source in self.sources(self.rows[:: max(1, len(self.rows) // 64)]):
            digest.update(source if isinstance(source, bytes) else str(source).encode())
