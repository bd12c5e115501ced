"""Image data sets that are read by whole batches and remember where each sample came from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from torchlethe.data.batches import PADDING_INDEX, PADDING_LABEL


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Base of all labelled image sets: a view of some rows of a store, read by whole batches.

    A subclass implements :meth:`read` (rows of its store to images) and :meth:`content` (what the fingerprint covers).
    Subsets share the store and keep each sample's ``index``, its position in the original training set.

    Args:
        labels: (N,) integers, the class of each row of the store.
        indices: (N,) integers, identity of each sample; the row numbers by default.
        classes: Names of the classes; ``"0"``, ``"1"`` … by default.
        subclasses: (N,) integers, a finer class of each sample, where there is one.
        subclass_names: Names of the subclasses.

    Attributes:
        labels: (N,) int64, what the samples are trained with.
        clean_labels: (N,) int64, the labels before label noise (the same tensor when there is none).
        indices: (N,) int64.
        rows: (N,) int64, row of each sample in the store.
        classes: List of class names.

    Raises:
        ValueError: If lengths differ or a label is negative.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        indices: Tensor | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        subclasses: Tensor | Sequence[int] | None = None,
        subclass_names: Sequence[str] | None = None,
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.rows = torch.arange(len(self.labels))
        self.indices = self.rows if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        self.clean_labels = self.labels
        self.subclasses = None if subclasses is None else torch.as_tensor(subclasses, dtype=torch.int64)
        self.subclass_names = None if subclass_names is None else list(subclass_names)
        if len(self.indices) != len(self.labels):
            raise ValueError(f"indices has {len(self.indices)} entries, but labels has {len(self.labels)}.")
        if len(self.labels) and int(self.labels.min()) < 0:
            raise ValueError(f"labels contains {int(self.labels.min())}, but class numbers start at 0.")
        count = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.classes = [str(label) for label in range(count)] if classes is None else list(classes)
        if len(self.classes) < count:
            raise ValueError(f"labels contains {count - 1}, but classes has only {len(self.classes)} names.")
        self._fingerprint: str | None = None

    def read(self, rows: Tensor) -> Tensor:
        """Return the images of some rows of the store.

        Args:
            rows: (B,) int64 row numbers.

        Returns:
            (B, C, H, W) uint8 (a wrapped foreign data set may give float32).
        """
        raise NotImplementedError

    def content(self, digest: Any) -> None:
        """Feed what identifies the images of this view into ``digest`` (a hashlib object)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """One sample (an int) or a batch (a sequence of ints) as a dict of ``image``, ``label`` and ``index``."""
        if isinstance(position, int):
            if not -len(self) <= position < len(self):
                raise IndexError(f"position is {position}, but the data set has {len(self)} samples.")
            return {name: value[0] for name, value in self.__getitems__([position % len(self)]).items()}
        return self.__getitems__(position)

    def __getitems__(self, positions: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Read a whole batch.

        Args:
            positions: (B,) positions in [0, N); ``~p`` (negative) asks for a padding duplicate of ``p``, which has the
                image of ``p``, the label -100 and the index -1.

        Returns:
            ``image`` (B, C, H, W) uint8, ``label`` (B,) int64, ``index`` (B,) int64.
        """
        positions = torch.as_tensor(positions, dtype=torch.int64)
        padding = positions < 0
        if not padding.any():
            return {
                "image": self.read(self.rows[positions]),
                "label": self.labels[positions],
                "index": self.indices[positions],
            }
        positions = torch.where(padding, ~positions, positions)
        return {
            "image": self.read(self.rows[positions]),
            "label": self.labels[positions].masked_fill_(padding, PADDING_LABEL),
            "index": self.indices[positions].masked_fill_(padding, PADDING_INDEX),
        }

    def subset(self, positions: Sequence[int] | Tensor) -> Self:
        """Return a view of some samples, in the given order; images are not copied and indices are kept.

        Args:
            positions: (M,) positions in [0, N), or a (N,) bool mask.
        """
        positions = torch.as_tensor(positions)
        positions = positions.nonzero().flatten() if positions.dtype is torch.bool else positions.to(torch.int64)
        view = copy.copy(self)
        view.rows, view.labels, view.indices = self.rows[positions], self.labels[positions], self.indices[positions]
        view.clean_labels = view.labels if self.clean_labels is self.labels else self.clean_labels[positions]
        view.subclasses = None if self.subclasses is None else self.subclasses[positions]
        view._fingerprint = None
        return view

    def with_labels(self, labels: Tensor) -> Self:
        """Return a view with other labels; the clean labels stay what they were.

        Args:
            labels: (N,) int64 in [0, number of classes).

        Raises:
            ValueError: If the shape or a value does not fit.
        """
        if labels.shape != self.labels.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, but the data set has {len(self)} samples.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in 0…{len(self.classes) - 1}, but reach {labels.min()}…{labels.max()}.")
        view = copy.copy(self)
        view.labels = labels.to(torch.int64)
        view._fingerprint = None
        return view

    def fingerprint(self) -> str:
        """Sha256 (hex) of images, labels and indices, computed once: equal data has it equal on every machine."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for tensor in (self.labels, self.indices):
                digest.update(tensor.numpy().tobytes())
            self.content(digest)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class InMemoryImages(ImageDataset):
    """A small data set as one uint8 tensor: a batch is one ``index_select``, with no Python per image.

    Args:
        images: (N, C, H, W) uint8, a tensor or an array, shared by all subsets.
        labels: (N,) integers.
        indices: (N,) integers, positions in the original training set; 0 … N-1 by default.
        classes: Names of the classes.
        subclasses: (N,) integers, a finer class of each sample, where there is one.
        subclass_names: Names of the subclasses.

    Raises:
        ValueError: If ``images`` is not uint8 NCHW or lengths differ.

    >>> data = InMemoryImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), [0, 1, 0, 1])
    >>> data.subset([1, 3])[[0, 1]]["index"].tolist()
    [1, 3]
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | Sequence[int],
        indices: Tensor | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        subclasses: Tensor | Sequence[int] | None = None,
        subclass_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(labels, indices, classes, subclasses, subclass_names)
        images = torch.as_tensor(images)
        if images.dtype is not torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images is {images.dtype} {tuple(images.shape)}, but must be uint8 of shape (N, C, H, W)."
            )
        if len(images) != len(self.labels):
            raise ValueError(f"images has {len(images)} entries, but labels has {len(self.labels)}.")
        self.store = images

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) uint8, the images of this view (a copy unless it is the whole store)."""
        whole = len(self.rows) == len(self.store) and torch.equal(self.rows, torch.arange(len(self.store)))
        return self.store if whole else self.store.index_select(0, self.rows)

    @override
    def read(self, rows: Tensor) -> Tensor:
        return self.store.index_select(0, rows.to(self.store.device))

    @override
    def content(self, digest: Any) -> None:
        digest.update(str(tuple(self.store.shape[1:])).encode())
        for rows in self.rows.split(4096):
            digest.update(self.read(rows).cpu().numpy().tobytes())
