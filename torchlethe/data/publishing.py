"""Writing a protected data set so that it survives a kill and is checked before anybody relies on it."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchlethe import __version__
from torchlethe.data.protected_formats import FORMATS, Chunk, Content, in_chunks, write_checked
from torchlethe.files import atomic_write

MANIFEST = "manifest.json"
LISTING = "images.csv"
PARTS = "parts"
NORMS = ("inf", "2", "rms", "pixels")


def measure_change(clean: Tensor, protected: Tensor) -> dict[str, Tensor]:
    """How much each image was changed.

    Args:
        clean: (B, C, H, W) uint8.
        protected: (B, C, H, W) uint8.

    Returns:
        ``inf`` (B,) int64, the largest |change| of a value in units of 1/255; ``2`` (B,) float64, the Euclidean norm of
        the change for images in [0, 1]; ``rms`` (B,) float64, the root mean square of the change in units of 1/255,
        which is the Euclidean norm free of the image's size; ``pixels`` (B,) int64, the pixels of which any channel
        changed; ``mean`` (B,) float64, the mean |change| in units of 1/255.

    Example:
        >>> clean = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
        >>> found = measure_change(clean, clean + 3)
        >>> found["inf"].item(), found["pixels"].item()
        (3, 4)
    """
    change = (protected.to(torch.int32) - clean.to(torch.int32)).abs()
    return {
        "inf": change.flatten(1).amax(1).long(),
        "2": change.double().div(255).square().flatten(1).sum(1).sqrt(),
        "rms": change.double().square().flatten(1).mean(1).sqrt(),
        "pixels": (change > 0).any(1).flatten(1).sum(1),
        "mean": change.double().flatten(1).mean(1),
    }


def allowance(bound: Mapping[str, Any], values: int) -> float:
    """The largest change that a bound allows once pixels are whole numbers.

    Args:
        bound: ``norm`` (``inf``, ``2``, ``rms`` or ``pixels``) and ``value``.
        values: numbers in an image, C·H·W.

    Returns:
        The value itself; for the Euclidean norm and the root mean square with what rounding to 8 bits adds at most,
        √values · 0.5/255 and 0.5.

    Raises:
        ValueError: the norm is unknown.
    """
    if bound.get("norm") not in NORMS:
        raise ValueError(f"norm is {bound.get('norm')!r}, a bound's norm is one of {', '.join(NORMS)}.")
    rounding = {"2": math.sqrt(values) * 0.5 / 255, "rms": 0.5}
    return float(bound["value"]) + rounding.get(bound["norm"], 0.0)


def _is_list(classes: Any) -> bool:
    return classes is None or (isinstance(classes, Iterable) and not isinstance(classes, str))


class ProtectedStore:
    """A folder that becomes a protected data set: batches go in, in any order and from any process, files come out.

    Each batch is one file below ``parts``, written whole or not at all. :meth:`finish` turns the parts into the asked
    for formats, reads every pixel back, and writes ``images.csv`` (index, label and change of each image) and, last,
    ``manifest.json``: where that exists, the data set is complete. Then the parts are removed.

    Args:
        folder: the folder; made when something is written.
        key: hexadecimal digits that name method, settings and source. A folder with another key is refused.
        formats: out of :data:`torchlethe.data.protected_formats.FORMATS`.
        bound: ``norm`` and ``value`` that no image's change may exceed, see :func:`allowance`.

    Raises:
        ValueError: a format or norm is unknown, or the folder holds something else.

    Note:
        Several processes (the ranks of a run) may share the folder, on one file system; one of them finishes.
    """

    def __init__(self, folder: str | Path, key: str, formats: Sequence[str], bound: Mapping[str, Any]) -> None:
        if isinstance(formats, str) or not formats or (unknown := [name for name in formats if name not in FORMATS]):
            wrong = formats if isinstance(formats, str) or not formats else unknown[0]
            raise ValueError(f"formats contains {wrong!r}, it must be a list out of {', '.join(FORMATS)}.")
        allowance(bound, 1)
        self.folder, self.key, self.formats, self.bound = Path(folder), key, tuple(formats), dict(bound)
        self.parts = self.folder / PARTS
        self._check_folder()
        self._complete = bool(self.manifest)

    def _check_folder(self) -> None:
        manifest, found = self.manifest, self.parts / "key.txt"
        key = manifest.get("key") if manifest else found.read_text().strip() if found.is_file() else None
        if (
            key is None
            and self.folder.is_dir()
            and any(not path.name.startswith(".") for path in self.folder.iterdir())
        ):
            raise ValueError(
                f"the folder '{self.folder}' is not empty and holds no protected data; choose another one."
            )
        if key is not None and key != self.key:
            raise ValueError(
                f"the folder '{self.folder}' holds data that were protected with another method, settings, "
                "precision, source or formats; choose another folder, or remove this one."
            )

    @property
    def manifest(self) -> dict[str, Any]:
        """What a complete data set says about itself; empty before."""
        path = self.folder / MANIFEST
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def finished(self) -> Tensor:
        """(M,) int64, the indices of the images that need no more work, ascending."""
        if self.manifest:
            rows = (self.folder / LISTING).read_text("utf-8").splitlines()[1:]
            return torch.tensor([int(row.split(",", 1)[0]) for row in rows], dtype=torch.int64)
        return torch.from_numpy(self._table()[0])

    def add(self, index: Tensor, label: Tensor, clean: Tensor, protected: Tensor) -> None:
        """Keep a batch, unless the data set is complete.

        Args:
            index: (B,) int64, different ones.
            label: (B,) int64.
            clean: (B, C, H, W) uint8.
            protected: (B, C, H, W) uint8.

        Raises:
            ValueError: shapes or types do not fit, or an image exceeds the bound; nothing is kept then.
        """
        for name, image in (("clean", clean), ("protected", protected)):
            if image.dtype is not torch.uint8 or image.ndim != 4 or image.shape != clean.shape:
                shape = tuple(clean.shape) if clean.ndim == 4 else "(B, C, H, W)"
                raise ValueError(f"{name} images are {image.dtype} {tuple(image.shape)}, but must be uint8 {shape}.")
        if label.shape != index.shape or label.is_floating_point():
            raise ValueError(
                f"label is {label.dtype} {tuple(label.shape)}, but must hold a whole class number for each of the "
                f"{len(index)} images."
            )
        if not len(index) or self._complete:
            return
        change = measure_change(clean, protected)
        norm, most = self.bound["norm"], allowance(self.bound, protected[0].numel())
        if bool((change[norm] > most).any()):
            worst = int(change[norm].argmax())
            raise ValueError(
                f"the image with index {int(index[worst])} was changed by {change[norm][worst].item():g} in the norm "
                f"{norm!r}, but the method's bound is {self.bound['value']}."
            )
        digests = [hashlib.sha256(image.tobytes()).digest() for image in clean.contiguous().cpu().numpy()]
        tensors = {"index": index, "label": label, "image": protected, **{f"change_{k}": v for k, v in change.items()}}
        tensors["clean"] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        self.parts.mkdir(parents=True, exist_ok=True)
        if not (self.parts / "key.txt").is_file():
            with atomic_write(self.parts / "key.txt") as temporary:
                temporary.write_text(f"{self.key}\n")
        # ranks have different images, and images that are finished do not come again, so this name is nobody else's
        name = f"{int(index[0]):09d}-{int(index[-1]):09d}-{len(index)}.safetensors"
        with atomic_write(self.parts / name) as temporary:
            save_file(plain, temporary)

    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Path]]:
        """Ascending indices, and for each the number of its part and its row in it; and the parts."""
        files = sorted(self.parts.glob("*.safetensors")) if self.parts.is_dir() else []
        columns: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 3]
        for number, path in enumerate(files):
            with safe_open(path, "np") as file:
                index = file.get_tensor("index")
            columns.append((index, np.full(len(index), number), np.arange(len(index))))
        index, part, row = (np.concatenate(column) for column in zip(*columns, strict=True))
        index, first = np.unique(index, return_index=True)
        return index, part[first], row[first], files

    def finish(
        self,
        classes: Sequence[str] | None = None,
        about: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> dict[str, Any]:
        """Write the formats, verify them, and write the manifest; nothing is done where that is there already.

        Args:
            classes: a name for each class, in the order of the labels; their numbers by default.
            about: what else the manifest is to say: plain values.
            expected: the number of images that must be there.

        Returns:
            The manifest.

        Raises:
            ValueError: images are missing, a class has no name, or a format cannot hold images with so many channels.
            OSError: what is read back is not what was written.
        """
        if manifest := self.manifest:
            return manifest
        index, part, row, files = self._table()
        if not len(index) or (expected is not None and len(index) != expected):
            raise ValueError(f"'{self.folder}' has {len(index)} of {expected or 'some'} protected images, not all.")

        @lru_cache(maxsize=64)
        def load(number: int, name: str) -> np.ndarray:
            with safe_open(files[number], "np") as file:
                return file.get_tensor(name)

        def gather(name: str, rows: np.ndarray) -> np.ndarray:
            # parts in their order, then back to the order of the index
            order = np.argsort(part[rows], kind="stable")
            numbers, starts = np.unique(part[rows][order], return_index=True)
            pieces = [
                load(int(number), name)[row[rows][own]]
                for number, own in zip(numbers, np.split(order, starts[1:]), strict=True)
            ]
            joined = np.concatenate(pieces)
            return joined[np.argsort(order, kind="stable")]

        def chunks() -> Iterator[Chunk]:
            def read(positions: np.ndarray) -> Chunk:
                return Chunk(index[positions], gather("label", positions), gather("image", positions))

            yield from in_chunks(np.arange(len(index)), read)

        shape = tuple(int(size) for size in load(int(part[0]), "image").shape[1:])
        if pictures := [name for name in self.formats if FORMATS[name].pictures and shape[0] not in (1, 3)]:
            raise ValueError(f"formats has {pictures[0]!r}, but the images have {shape[0]} channels: take 'npz'.")
        everything = np.arange(len(index))
        labels = gather("label", everything)
        count = int(labels.max()) + 1
        names = [str(name) for name in (range(count) if classes is None else classes)] if _is_list(classes) else []
        if len(names) < count:
            raise ValueError(f"classes is {classes!r}, but must be a list with a name for each of the {count} classes.")
        content = Content(len(index), shape, tuple(names), chunks)  # type: ignore[arg-type]
        written = {name: write_checked(name, self.folder, content) for name in self.formats}
        changes = {name: gather(f"change_{name}", everything) for name in (*NORMS, "mean")}
        self._list(index, labels, changes, names)
        source = hashlib.sha256(gather("clean", everything).tobytes()).hexdigest()
        manifest = {
            "manifest_version": 1,
            "lethe": __version__,
            "key": self.key,
            "images": len(index),
            "shape": list(shape),
            "classes": names,
            "source": {
                "sha256": source,
                "meaning": "SHA-256 over the SHA-256 digests of the clean images' uint8 bytes (C, H, W), by index",
            },
            "bound": self.bound,
            "verified": {
                "images": len(index),
                "allowed": allowance(self.bound, math.prod(shape)),
                "largest": float(changes[self.bound["norm"]].max()),
                "mean_change": float(changes["mean"].mean()),
                "read_back": list(self.formats),
            },
            "files": written,
            "listing": LISTING,
            **(about or {}),
        }
        with atomic_write(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", "utf-8")
        shutil.rmtree(self.parts)
        self._complete = True
        return manifest

    def _list(
        self, index: np.ndarray, label: np.ndarray, changes: Mapping[str, np.ndarray], classes: Sequence[str]
    ) -> None:
        with (
            atomic_write(self.folder / LISTING) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["index", "label", "class", "largest_change", "changed_pixels", "l2"])
            columns = (index, label, changes["inf"], changes["pixels"], changes["2"])
            for i, y, largest, pixels, norm in zip(*(column.tolist() for column in columns), strict=True):
                writer.writerow([i, y, classes[y], largest, pixels, f"{norm:.6g}"])
