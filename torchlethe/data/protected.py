"""Reading a protected data set, and putting its images in the place of the clean ones."""

from __future__ import annotations

import csv
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from typing_extensions import override

from torchlethe.data.hashing import generator_for
from torchlethe.data.images import ImageDataset, InMemoryImages
from torchlethe.data.protected_formats import decode_png
from torchlethe.data.publishing import LISTING, MANIFEST, allowance, measure_change


@dataclass(frozen=True, eq=False)
class ProtectedImages:
    """The images of a protected data set.

    Attributes:
        images: (N, C, H, W) uint8.
        indices: (N,) int64, positions in the training set they come from, ascending.
        labels: (N,) int64; empty where the source does not say.
        manifest: what the data set says about itself; empty for files without one.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor
    manifest: dict[str, Any] = field(default_factory=dict)


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = sorted(arrays.files)
            found = {name: arrays[name] for name in ("image", "index", "label") if name in names}
    except ValueError:  # numpy would advise to unpickle it
        raise ValueError(f"protected is '{path}', but that is no .npz file of plain arrays.") from None
    if "image" not in found:
        raise ValueError(f"protected is '{path}', but it has no array 'image' (it has {', '.join(names)}).")
    image = found["image"]
    return image, found.get("index", np.arange(len(image))), found.get("label", np.empty(0, np.int64))


def _from_parquet(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = pq.read_table(path)
    image = np.stack([decode_png(cell["bytes"]) for cell in table.column("image").to_pylist()])
    index = table.column("index").to_numpy() if "index" in table.column_names else np.arange(len(image))
    return image, index, table.column("label").to_numpy() if "label" in table.column_names else np.empty(0, np.int64)


def _from_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Files ``<index>.png`` in one folder or in one for each class; labels from ``images.csv`` beside it."""
    if below := next(folder.rglob(MANIFEST), None):
        raise ValueError(f"protected is '{folder}', which is above the protected data set '{below.parent}': name that.")
    found = [path for pattern in ("*.png", "*/*.png") for path in folder.glob(pattern) if path.stem.isdigit()]
    files = {int(path.stem): path for path in found}
    if not files:
        raise FileNotFoundError(f"protected is '{folder}', but there are no files '<index>.png'.")
    if len(files) < len(found):
        twice = next(path for path in found if files[int(path.stem)] is not path)
        raise ValueError(f"protected is '{folder}', but several files there have the index of '{twice}'.")
    index = np.array(sorted(files), dtype=np.int64)
    label, listing = np.empty(0, np.int64), folder.parent / LISTING
    if listing.is_file():
        with listing.open(newline="", encoding="utf-8") as file:
            known = {int(row["index"]): int(row["label"]) for row in csv.DictReader(file)}
        label = np.array([known[i] for i in index.tolist()], dtype=np.int64)
    return np.stack([decode_png(files[i]) for i in index.tolist()]), index, label


def read_protected(path: str | Path) -> ProtectedImages:
    """Read a protected data set, by Lethe or by others.

    Args:
        path: the folder of a data set with its ``manifest.json``; or one file ``.npz`` (arrays ``image`` and, where
            there is one, ``index`` and ``label``) or ``.parquet`` (columns of these names); or a folder of files
            ``<index>.png``, in one folder or one for each class.

    Returns:
        The images in ascending order of their index.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the data set is unfinished, or a file lacks the images.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"protected is '{path}', but there is no such file or folder.")
    manifest: dict[str, Any] = {}
    source = path
    if path.is_dir() and (path / MANIFEST).is_file():
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        best = next(name for name in ("npz", "parquet", "png_flat", "png") if name in files)
        source = path / files[best]["path"]
    elif path.is_dir() and (path / "parts").is_dir():
        raise ValueError(f"protected is '{path}', but that data set is unfinished: run its `predict` again.")
    readers = {".npz": _from_npz, ".parquet": _from_parquet}
    if not source.is_dir() and source.suffix not in readers:
        raise ValueError(f"protected is '{path}', but must be a folder, an .npz or a .parquet file.")
    try:
        image, index, label = (_from_pictures if source.is_dir() else readers[source.suffix])(source)
    except (zipfile.BadZipFile, pa.ArrowException, KeyError, OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"protected is '{path}', but '{source}' cannot be read: {error}") from error
    if image.dtype != np.uint8 or image.ndim != 4 or len(image) != len(index):
        raise ValueError(
            f"protected is '{path}', but its images are {image.dtype} {image.shape}, not uint8 (N, C, H, W)."
        )
    order = np.argsort(index, kind="stable")
    images, indices, labels = (
        torch.from_numpy(np.ascontiguousarray(column[order] if len(column) else column))
        for column in (image, index, label)
    )
    return ProtectedImages(images, indices, labels.long(), manifest)


def choose_protected(
    dataset: ImageDataset,
    available: Tensor,
    ratio: float = 1.0,
    classes: Sequence[int] | None = None,
    indices: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Which images of a training set are protected.

    Args:
        dataset: the training set.
        available: (M,) int64, the indices that have a protected version.
        ratio: share of them that is used, in [0, 1]: the first ``round(ratio · N)`` of a seeded permutation of all
            indices, so that a smaller share is contained in a larger one.
        classes: only images with one of these labels.
        indices: (K,) int64, only images with one of these indices.
        seed: seed of the draw.

    Returns:
        (N,) bool, over the positions of ``dataset``.

    Raises:
        ValueError: the data set has no image of a class, or no image of such an index can exist.

    Example:
        >>> data = InMemoryImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 1, 0, 1])
        >>> choose_protected(data, torch.arange(4), classes=[1]).tolist()
        [False, True, False, True]
    """
    chosen = torch.isin(dataset.indices, available)
    if classes is not None:
        wanted = torch.as_tensor(list(classes), dtype=torch.int64)
        if len(missing := wanted[~torch.isin(wanted, dataset.labels)]):
            raise ValueError(f"classes contains {int(missing[0])}, but no training image has it.")
        chosen &= torch.isin(dataset.labels, wanted)
    if indices is not None:
        if len(missing := indices[_beyond(indices, dataset)]):
            raise ValueError(f"indices contains {int(missing[0])}, but no training image has it.")
        chosen &= torch.isin(dataset.indices, indices)
    if ratio < 1:
        positions = chosen.nonzero().flatten()
        order = torch.randperm(len(positions), generator=generator_for("protected part", seed))
        chosen = torch.zeros_like(chosen)
        chosen[positions[order[: round(ratio * len(positions))]]] = True
    return chosen


def _beyond(indices: Tensor, dataset: ImageDataset) -> Tensor:
    """Which indices cannot be of this data: one in between may belong to images that are held out."""
    return (indices < 0) | (indices > dataset.indices.max())


def check_fits(dataset: ImageDataset, protected: ProtectedImages) -> None:
    """Refuse protected images that belong to another training set.

    Args:
        dataset: the clean training set.
        protected: the protected images.

    Raises:
        ValueError: no index is shared, shapes or labels differ, or the change is larger than the manifest's bound.
    """
    known, place = torch.isin(protected.indices, dataset.indices), protected.indices
    if not known.any():
        raise ValueError("protected shares no index with the training set; it was made from other data.")
    if (beyond := _beyond(protected.indices, dataset)).any():
        warnings.warn(
            f"protected has {len(known)} images, and {int(beyond.sum())} of them have an index beyond the training "
            "set's: these are not used.",
            stacklevel=2,
        )
    position = {index: i for i, index in enumerate(dataset.indices.tolist())}
    rows = torch.tensor([position[index] for index in place[known].tolist()])
    if len(protected.labels) and not torch.equal(dataset.clean_labels[rows], protected.labels[known]):
        raise ValueError("protected has other labels than the training set; it was made from other data.")
    sample = torch.arange(len(rows))[:: max(1, len(rows) // 512)]
    clean, image = dataset.read(dataset.rows[rows[sample]]), protected.images[known][sample]
    if clean.dtype is not torch.uint8 or clean.shape != image.shape:
        raise ValueError(
            f"protected has images {tuple(image.shape[1:])}, but the training set has {tuple(clean.shape[1:])}."
        )
    if bound := protected.manifest.get("bound"):
        change = measure_change(clean, image)[bound["norm"]]
        if bool((change > allowance(bound, image[0].numel())).any()):
            raise ValueError(
                f"protected differs from the training set by up to {change.max().item():g} in the norm "
                f"{bound['norm']!r}, more than its bound {bound['value']}; it was made from other data."
            )


class ReplacedImages(ImageDataset):
    """A data set of which some images are replaced; labels, indices and everything else stay.

    Args:
        dataset: any image set.
        positions: (M,) int64, the positions whose images are replaced.
        images: (M, C, H, W) uint8.
        transform: applied to every image when it is read, uint8 to uint8.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        positions: Tensor,
        images: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(dataset.labels, dataset.indices, dataset.classes, dataset.subclasses, dataset.subclass_names)
        self.clean_labels = dataset.clean_labels
        self.dataset, self.images, self.transform = dataset, images, transform
        self.place = torch.full((len(dataset),), -1, dtype=torch.int64)
        self.place[positions] = torch.arange(len(positions))

    @override
    def read(self, rows: Tensor) -> Tensor:
        images, place = self.dataset.read(self.dataset.rows[rows]), self.place[rows]
        replaced = place >= 0
        if replaced.any():
            images[replaced] = self.images[place[replaced]]
        return images if self.transform is None else self.transform(images)

    @override
    def content(self, digest: Any) -> None:
        digest.update(self.dataset.fingerprint().encode())
        for rows in self.rows.split(4096):
            place = self.place[rows]
            digest.update(place.numpy().tobytes() + self.images[place[place >= 0]].numpy().tobytes())
        digest.update(repr(self.transform).encode())


def in_memory(dataset: ImageDataset) -> InMemoryImages:
    """The samples of an image set as one uint8 tensor, with their labels, indices and names."""
    images = torch.cat([dataset.read(rows) for rows in dataset.rows.split(4096)])
    found = InMemoryImages(
        images, dataset.labels, dataset.indices, dataset.classes, dataset.subclasses, dataset.subclass_names
    )
    found.clean_labels = dataset.clean_labels
    return found
