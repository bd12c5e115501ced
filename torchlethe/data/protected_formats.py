"""The file formats of a protected data set: each is read by common libraries, without Lethe, and loses no pixel."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from torchlethe.files import atomic_write, file_hash

CHUNK = 1024  # images in memory at a time, and in a row group


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some images in ascending order of their index.

    Attributes:
        index: (B,) int64.
        label: (B,) int64.
        image: (B, C, H, W) uint8.
    """

    index: np.ndarray
    label: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class Content:
    """What is to be written.

    Attributes:
        count: number of images.
        shape: (C, H, W).
        classes: names of the classes.
        chunks: goes through all images again each time it is called.
    """

    count: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    chunks: Callable[[], Iterator[Chunk]]


def encode_png(image: np.ndarray) -> bytes:
    """(C, H, W) uint8 with one or three channels as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes | Path) -> np.ndarray:
    """The (C, H, W) uint8 pixels of an image file."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def class_folders(classes: Sequence[str]) -> list[str]:
    """Folder names whose alphabetical order is that of the labels, as torchvision's ``ImageFolder`` counts them.

    Example:
        >>> class_folders(["cat", "dog"]), class_folders(["dog", "a/b"])
        (['cat', 'dog'], ['0_dog', '1_a_b'])
    """
    safe = ["".join("_" if sign in '/\\:*?"<>|' or not sign.isprintable() else sign for sign in c) for c in classes]
    if safe == sorted(set(safe)) and not any(name.startswith(".") or not name for name in safe):
        return safe
    width = len(str(len(safe) - 1))
    return [f"{label:0{width}d}_{name}" for label, name in enumerate(safe)]


def _png_files(content: Content, tree: bool) -> Callable[[int, int], str]:
    folders = class_folders(content.classes)
    return lambda index, label: f"{folders[label]}/{index}.png" if tree else f"{index}.png"


def _write_png(folder: Path, content: Content, tree: bool) -> Path:
    name, root = _png_files(content, tree), folder / ("images" if tree else "flat")
    root.mkdir(parents=True, exist_ok=True)
    for place in class_folders(content.classes) if tree else ():
        (root / place).mkdir(exist_ok=True)

    def write(index: int, label: int, image: np.ndarray) -> None:
        (root / name(index, label)).write_bytes(encode_png(image))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib leaves the interpreter lock
        for chunk in content.chunks():
            list(pool.map(write, chunk.index.tolist(), chunk.label.tolist(), chunk.image))
    return root


def _read_png(folder: Path, content: Content, tree: bool) -> Iterator[np.ndarray]:
    name, root = _png_files(content, tree), folder / ("images" if tree else "flat")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for chunk in content.chunks():
            files = [root / name(*pair) for pair in zip(chunk.index.tolist(), chunk.label.tolist(), strict=True)]
            yield np.stack(list(pool.map(decode_png, files)))


def _write_npz(folder: Path, content: Content) -> Path:
    """As ``np.savez`` does, but chunk by chunk."""
    path = folder / "protected.npz"
    arrays: dict[str, tuple[str, tuple[int, ...], Callable[[Chunk], np.ndarray]]] = {
        "image": ("|u1", (content.count, *content.shape), lambda chunk: chunk.image),
        "label": ("<i8", (content.count,), lambda chunk: chunk.label),
        "index": ("<i8", (content.count,), lambda chunk: chunk.index),
    }
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, (kind, shape, values) in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as file:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in content.chunks():
                    file.write(np.ascontiguousarray(values(chunk), dtype=kind).tobytes())
    return path


def _read_npz(folder: Path, content: Content) -> Iterator[np.ndarray]:
    with np.load(folder / "protected.npz", allow_pickle=False) as arrays:
        image = arrays["image"]
    for start in range(0, len(image), CHUNK):
        yield image[start : start + CHUNK]


def _write_parquet(folder: Path, content: Content) -> Path:
    """The schema of the Hugging Face `datasets` library: an Image and a ClassLabel column, and the index."""
    path = folder / "train-00000-of-00001.parquet"
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(content.classes), "_type": "ClassLabel"},
        "index": {"dtype": "int64", "_type": "Value"},
    }
    schema = pa.schema(
        [("image", picture), ("label", pa.int64()), ("index", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for chunk in content.chunks():
            images = [
                {"bytes": encode_png(image), "path": f"{index}.png"}
                for index, image in zip(chunk.index.tolist(), chunk.image, strict=True)
            ]
            columns = {"image": images, "label": chunk.label, "index": chunk.index}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=CHUNK)
    return path


def _read_parquet(folder: Path, content: Content) -> Iterator[np.ndarray]:
    with pq.ParquetFile(folder / "train-00000-of-00001.parquet") as file:
        for batch in file.iter_batches(CHUNK, columns=["image"]):
            yield np.stack([decode_png(cell["bytes"]) for cell in batch.column(0).to_pylist()])


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        write: writes all images below a folder; returns the file or folder that holds them.
        read: reads the written pixels back, in the order of the index.
        pictures: whether it holds image files, so that images have one or three channels.
    """

    write: Callable[[Path, Content], Path]
    read: Callable[[Path, Content], Iterator[np.ndarray]]
    pictures: bool = True


FORMATS: dict[str, Format] = {
    "png": Format(lambda f, c: _write_png(f, c, True), lambda f, c: _read_png(f, c, True)),
    "png_flat": Format(lambda f, c: _write_png(f, c, False), lambda f, c: _read_png(f, c, False)),
    "npz": Format(_write_npz, _read_npz, pictures=False),
    "parquet": Format(_write_parquet, _read_parquet),
}
"""``png``: ``images/<class>/<index>.png``; ``png_flat``: ``flat/<index>.png``; ``npz``: ``protected.npz`` with the
arrays ``image``, ``label``, ``index``; ``parquet``: the schema of the Hugging Face ``datasets`` library."""


def write_checked(name: str, folder: Path, content: Content) -> dict[str, Any]:
    """Write one format, and read every pixel of it back.

    Args:
        name: out of :data:`FORMATS`.
        folder: the folder of the data set.
        content: what to write.

    Returns:
        ``path`` relative to the folder and ``sha256``: of the file, or of a folder's names and contents.

    Raises:
        OSError: what is read is not what was written.
    """
    format_ = FORMATS[name]
    path = format_.write(folder, content)
    count = 0
    for written, chunk in zip(format_.read(folder, content), content.chunks(), strict=True):
        if not np.array_equal(written, chunk.image):
            raise OSError(f"'{path}' was written, but reading it back gives other pixels; the disk may be damaged.")
        count += len(written)
    if count != content.count:
        raise OSError(f"'{path}' holds {count} of {content.count} images after it was written.")
    relative = path.relative_to(folder).as_posix()
    return {"path": relative, "sha256": file_hash(path) if path.is_file() else _folder_hash(path)}


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def in_chunks(indices: np.ndarray, read: Callable[[np.ndarray], Chunk]) -> Iterable[Chunk]:
    """Chunks of all images in ascending order of their index.

    Args:
        indices: (N,) int64, ascending.
        read: the images of some of them.
    """
    for start in range(0, len(indices), CHUNK):
        yield read(indices[start : start + CHUNK])
