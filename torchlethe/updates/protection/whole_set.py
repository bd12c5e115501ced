"""All images of a preparation in memory, in the order of their index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchlethe.data.hashing import generator_for
from torchlethe.updates.protection.base import Batches


class WholeSet:
    """The images, labels and indices of a data set as tensors, whatever batches they came in.

    What is computed from it does not depend on the loader's batch size, as rows are sorted by index.

    Args:
        data: see :data:`~torchlethe.updates.protection.base.Batches`.
        device: where to keep it.

    Raises:
        ValueError: there is no image, or an index occurs twice.
    """

    def __init__(self, data: Batches, device: torch.device | str) -> None:
        batches = [(batch["image"], batch["label"], batch["index"]) for batch in data]
        if not batches:
            raise ValueError("data is empty, so there is nothing to prepare on.")
        image, label, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
        index, order = index.to(device).sort()
        if bool((index[1:] == index[:-1]).any()):
            raise ValueError("data has several images of the same index, by which their noise could not be told apart.")
        self.image, self.label, self.index = image.to(device)[order], label.to(device)[order], index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and indices."""
        return self.image, self.label, self.index

    def subset(self, share: float, seed: int) -> WholeSet:
        """A random share of the images of each class, at least one of each."""
        if share == 1:
            return self
        order = torch.randperm(len(self), generator=generator_for("protection subset", seed))
        label = self.label.cpu()[order]
        chosen = []
        for number in label.unique():
            members = order[label == number]
            chosen.append(members[: max(1, round(share * len(members)))])
        rows = torch.cat(chosen).sort().values.to(self.index.device)
        part = object.__new__(WholeSet)
        part.image, part.label, part.index = self.image[rows], self.label[rows], self.index[rows]
        return part

    def training_rows(self, size: int, seed: int, skip: int = 0) -> Iterator[Tensor]:
        """Endless shuffled batches of row numbers; incomplete ones are left out where a complete one exists.

        Args:
            size: images of a batch.
            seed: seed of the order.
            skip: batches to leave out at the beginning, as they were used before.
        """
        size = min(size, len(self))
        epoch, skip = divmod(skip, len(self) // size)
        while True:
            order = torch.randperm(len(self), generator=generator_for("protection batches", seed, epoch))
            for rows in order.to(self.index.device).split(size)[skip:]:
                if len(rows) == size:
                    yield rows
            epoch, skip = epoch + 1, 0

    def rows(self, size: int) -> Iterator[Tensor]:
        """All row numbers in order, in batches."""
        yield from torch.arange(len(self), device=self.index.device).split(size)


def rows_of(index: Tensor, known: Tensor) -> Tensor:
    """Where indices lie in a sorted list.

    Args:
        index: (B,) int64.
        known: (N,) int64, ascending.

    Returns:
        (B,) int64 row numbers.

    Raises:
        ValueError: an index is not in the list.
    """
    place = torch.searchsorted(known, index).clamp_max(max(len(known) - 1, 0))
    found = known[place] == index if len(known) else torch.zeros_like(index, dtype=torch.bool)
    if not bool(found.all()):
        missing = int(index[~found][0])
        raise ValueError(f"index {missing} was not among the images that were prepared on, so it has no noise.")
    return place
