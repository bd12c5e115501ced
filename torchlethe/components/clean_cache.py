"""What the network says about clean images, kept, so that it is asked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchlethe.components.distributed import gather_in_order

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(image: Tensor) -> Tensor:
    """One integer for each image, that tells whether it is bit for bit the same; nothing waits for the device.

    Args:
        image: (B, …) of any dtype.

    Returns:
        (B,) int64.
    """
    words = image.contiguous().flatten(1).view(_INTEGER[image.itemsize]).long()
    place = torch.arange(1, words.shape[1] + 1, device=words.device)
    weights = (place * -7046029254386353131) | 1  # odd multiples of the golden ratio: a change in any pixel counts
    return (words * (weights ^ (weights >> 29))).sum(1)


class BatchCache:
    """Outputs on batches that come again in the same order, as those of a validation loader.

    Each batch is compared with the one that was there before, by :func:`fingerprint`; a changed one is asked anew.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def get(self, number: int, image: Tensor, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs on batch ``number``, computed where they are not known.

        Args:
            number: position of the batch.
            image: (B, C, H, W).
            compute: what gives the outputs.
        """
        mark = fingerprint(image)
        if (known := self.kept.get(number)) is None or not torch.equal(known[0], mark):
            known = self.kept[number] = (mark, compute())
        return known[1]


class IndexCache:
    """Outputs by the index of an image, for training data whose order changes and whose pixels do not.

    Args:
        index: (N,) int64, −1 for padding; under DDP this rank's part, of the same length on every rank.
        outputs: tensors (N, …) by name.
        marks: (N,) :func:`fingerprint` of the images.

    Note:
        Under DDP every rank gets all rows.
    """

    def __init__(self, index: Tensor, outputs: Mapping[str, Tensor], marks: Tensor) -> None:
        index, marks = gather_in_order(index), gather_in_order(marks)
        real = index >= 0
        self.rows = torch.full((int(index.max()) + 1,), -1, device=index.device)
        self.rows[index[real]] = torch.arange(int(real.sum()), device=index.device)
        self.outputs = {name: gather_in_order(value)[real] for name, value in outputs.items()}
        self.marks = marks[real]
        self.changed = torch.zeros((), dtype=torch.int64, device=index.device)

    def get(self, index: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The outputs of a batch; images that are not those of the cache are counted, see :meth:`check`."""
        known = index < len(self.rows)
        rows = torch.where(known, self.rows[index.clamp(max=len(self.rows) - 1)], -1)
        self.changed += ((rows < 0) | (self.marks[rows] != fingerprint(image))).sum()
        return {name: value[rows] for name, value in self.outputs.items()}

    def check(self) -> None:
        """Raise if any image was another one than in the first pass.

        Raises:
            ValueError: images change between passes.
        """
        if int(self.changed):
            raise ValueError(
                f"cache_clean is on, but {int(self.changed)} training images were not the ones that the cache was "
                "filled with: switch augmentation off, or set cache_clean to 'never'."
            )
