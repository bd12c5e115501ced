"""A fixed, evenly spread part of the forget set, chosen in one pass and alike for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from torchlethe.components.distributed import all_reduce_sum, world_size
from torchlethe.data import PADDING_LABEL


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def sample_ids(batch: dict[str, Any], first: int = 0) -> Tensor:
    """The identities (B,) of a batch's samples: ``index``, or without it their place in the batch of all ranks.

    Args:
        batch: a dict with ``label`` (B,) and perhaps ``index`` (B,).
        first: samples of this rank that came before, where places are to count on from batch to batch.
    """
    if "index" in batch:
        return batch["index"]
    places = torch.arange(first, first + len(batch["label"]), device=batch["label"].device)
    return places * world_size() + _rank()


class ForgetSamples:
    """Every s-th sample of a pass in stored order, with the smallest power of two s that keeps at most ``limit``.

    Under DDP rank r passes every W-th sample from the r-th on, padded by samples with the label -100, and keeps its
    share of what one process would keep.

    Args:
        limit: most samples to keep over all ranks.

    Attributes:
        kept: images (M, …), labels (M,) and identities (M,) of this rank's share, after :meth:`finish`.
        example: one or two images; with one, some networks squeeze the batch away.
        size: samples in the first batch, and ``batches`` the number of batches.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.stride = limit, 1
        self.size = self.batches = self._seen = 0
        self._real: list[Tensor] = []
        self._parts: list[tuple[Tensor, ...]] = []
        self._ids: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, batch: dict[str, Any], keep_ids: bool = False) -> None:
        """Take in a batch.

        Args:
            batch: a dict with ``image`` and ``label``, on the device.
            keep_ids: remember identity and label of every sample, see :attr:`all_ids`.
        """
        label = batch["label"]
        ids, real = sample_ids(batch, self._seen), label != PADDING_LABEL
        place = torch.arange(self._seen, self._seen + len(label), device=label.device) * world_size() + _rank()
        self._real.append(real.sum())
        self._parts.append((batch["image"], label, ids, torch.where(real, place, -1)))
        if not self.batches:
            self.example = batch["image"][:2]
        self.size, self._seen = self.size or len(label), self._seen + len(label)
        self.batches += 1
        if keep_ids:
            self._ids.append(ids)
            self._labels.append(label)
        # a rank knows no more than its own count here; what is too much is dropped at the end
        self._thin((self._seen - 1) * world_size())

    def _thin(self, total: int) -> None:
        before = self.stride
        while -(-total // self.stride) > self.limit:
            self.stride *= 2
        # the last batch was added whole
        chosen = range(len(self._parts)) if self.stride != before else range(len(self._parts) - 1, len(self._parts))
        for number in chosen:
            place = self._parts[number][3]
            kept = (place >= 0) & (place % self.stride == 0)
            self._parts[number] = tuple(tensor[kept] for tensor in self._parts[number])

    def finish(self) -> None:
        """End the pass.

        Raises:
            ValueError: there was no sample.
        """
        count = int(all_reduce_sum(torch.stack(self._real).sum())) if self._real else 0
        if not count:
            raise ValueError("the forget set is empty, so there is nothing to unlearn.")
        self._thin(count)
        image, label, ids, _ = (torch.cat(tensors) for tensors in zip(*self._parts, strict=True))
        self.kept = (image, label, ids)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The kept samples in batches of at most :attr:`size`; none where this rank keeps nothing."""
        for image, label, ids in zip(*(tensor.split(self.size) for tensor in self.kept), strict=True):
            if len(label):
                yield image, label, ids

    @property
    def all_ids(self) -> Tensor:
        """Identities (n,) of all samples of this rank in stored order, padding included."""
        return torch.cat(self._ids)

    @property
    def all_labels(self) -> Tensor:
        """Labels (n,) that go with :attr:`all_ids`."""
        return torch.cat(self._labels)
