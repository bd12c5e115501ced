"""Other projects' map-style data sets, read by whole batches and with indices."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate
from typing_extensions import override

from torchlethe.data.batches import as_batch
from torchlethe.data.images import ImageDataset


def find_labels(dataset: Any) -> Tensor:
    """Labels of a map-style data set, without reading its images where that is possible.

    Looks for ``targets``, ``labels`` or ``_labels``, into ``Subset``, ``ConcatDataset`` and ``TensorDataset``; else
    (or where a ``target_transform`` changes them) reads every sample once.

    Args:
        dataset: Map-style data set of (image, label) pairs or of dicts.

    Returns:
        (N,) int64.

    Raises:
        ValueError: If the labels are not whole numbers.
    """
    found: Any = None
    if isinstance(dataset, Subset):
        return find_labels(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([find_labels(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        found = dataset.tensors[1]
    elif getattr(dataset, "target_transform", None) is None:
        names = ("targets", "labels", "_labels")
        found = next((getattr(dataset, name) for name in names if getattr(dataset, name, None) is not None), None)
    if found is None or len(found) != len(dataset):
        found = [as_batch(dataset[position])["label"] for position in range(len(dataset))]
    try:
        labels = torch.as_tensor(found if isinstance(found, Tensor) else [int(label) for label in found])
    except (TypeError, ValueError):
        labels = torch.empty(0)
    if labels.shape != (len(dataset),) or labels.is_floating_point():
        raise ValueError(f"dataset {type(dataset).__name__} has no whole-number label per sample, but needs one.")
    return labels.to(torch.int64)


class WrappedDataset(ImageDataset):
    """A map-style data set of another project with Lethe's interface: ``index`` is the position in it.

    Args:
        dataset: Map-style data set of (image, label, …) or of dicts; images are tensors or PIL images.
        classes: Names of the classes; ``dataset.classes`` by default.

    Raises:
        ValueError: If ``dataset`` has no length, is empty, or its labels cannot be found.
    """

    def __init__(self, dataset: Dataset[Any], classes: list[str] | None = None) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, but only data sets with a length and positions can be divided "
                "into what is forgotten and what remains."
            )
        labels = find_labels(dataset)
        if classes is None:
            named = getattr(dataset, "classes", None)
            fits = isinstance(named, (list, tuple)) and len(labels) and len(named) > int(labels.max())
            classes = [str(name) for name in named] if fits else None  # type: ignore[union-attr]
        super().__init__(labels, classes=classes)
        self.dataset = dataset

    @override
    def read(self, rows: Tensor) -> Tensor:
        images = [as_batch(self.dataset[row])["image"] for row in rows.tolist()]
        if not isinstance(images[0], Tensor):
            from torchvision.transforms.functional import pil_to_tensor

            images = [pil_to_tensor(image) for image in images]
        return default_collate(images)

    @override
    def content(self, digest: Any) -> None:
        # Images are not read for it: they may be many, behind transforms, or not ours to look at.
        digest.update(type(self.dataset).__name__.encode())

    def with_transform_of(self, other: Any) -> WrappedDataset:
        """A view that uses the (deterministic) transform of another data set of the same class, such as the test set.

        Args:
            other: The data set whose ``transform`` to use; without one the view is unchanged.
        """
        view = copy.copy(self)
        view.dataset = replace_transform(self.dataset, innermost(other))
        return view


def innermost(dataset: Any) -> Any:
    """The data set below all ``Subset``s."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def replace_transform(dataset: Any, source: Any) -> Any:
    """A view of a data set with the transform of another of its class; of another class, the data set itself."""
    if isinstance(dataset, Subset):
        return Subset(replace_transform(dataset.dataset, source), dataset.indices)
    if type(dataset) is not type(source) or not hasattr(dataset, "transform"):
        return dataset
    dataset = copy.copy(dataset)
    for name in ("transform", "transforms"):  # torchvision keeps both
        if hasattr(source, name):
            setattr(dataset, name, getattr(source, name))
    return dataset
