"""A DataLoader that knows its position and continues exactly there after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from torchlethe.arguments import check_at_least
from torchlethe.data.samplers import PositionedSampler, RoleSampler


def identity(batch: Any) -> Any:
    """The collate function of data sets that return whole batches."""
    return batch


class PositionedLoader(DataLoader[Any]):
    """A DataLoader over a :class:`~torchlethe.data.ImageDataset` with a position ``{epoch, batches}``.

    Lightning (2.6 and newer) saves ``state_dict()`` in its checkpoints and restores it, so that a run that was cut off
    in the middle of an epoch goes on with the very next batch, whatever the number of workers and how far these had
    prefetched. A plain loop can do the same. Each finished pass moves on to the next epoch by itself;
    ``loader.sampler.set_epoch`` (which Lightning calls) chooses one.

    Args:
        dataset: Data set with ``__getitems__`` that returns a whole batch.
        batch_size: Samples per batch and rank.
        shuffle: True for training: new order each epoch, and batches carry ``epoch`` (B,) int64, the key of the
            augmentation. False for evaluation: stored order, no ``epoch``; under DDP the padding duplicates carry the
            label -100 and the index -1.
        seed: Order seed, equal on all ranks.
        num_replicas: Number of ranks; by default that of ``torch.distributed``, or 1.
        rank: This rank; by default that of ``torch.distributed``, or 0.
        drop_last: Drop the last short batch.
        sampler: Another sampler (Lightning injects one for ``overfit_batches``); such a loader has no ``epoch``.
        batch_sampler: Another batch sampler (Lightning injects one to predict).
        **kwargs: Further arguments of ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: If the data set is empty or ``batch_size`` is not positive.

    >>> from torchlethe.data import InMemoryImages
    >>> data = InMemoryImages(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), [0, 1, 0, 1, 0])
    >>> loader = PositionedLoader(data, batch_size=2, shuffle=True)
    >>> batch = next(iter(loader))
    >>> loader.state_dict(), batch["epoch"].tolist()
    ({'epoch': 0, 'batches': 1}, [0, 0])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        sampler: Any = None,
        batch_sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError("dataset is empty, but a loader needs at least one sample.")
        if batch_size is not None:
            check_at_least(1, batch_size=batch_size)
        kwargs.setdefault("collate_fn", identity)
        if batch_sampler is not None:
            super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
            return
        if sampler is None:
            sampler = PositionedSampler(dataset, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=drop_last, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing starts before the first batch is asked for: Lightning calls `iter` before it
        # calls `set_epoch`.
        sampler = self.sampler
        if not isinstance(sampler, (PositionedSampler, RoleSampler)):
            yield from super().__iter__()
            return
        if not sampler.resumed:
            sampler.batches = 0
        elif sampler.batches >= len(self):
            sampler.set_epoch(sampler.epoch + 1)
        sampler.resumed = False
        epoch = sampler.epoch
        sampler.skip = sampler.batches * (self.batch_size or 1)
        batches = super().__iter__()
        for batch in batches:
            sampler.batches += 1
            yield self.tag(batch, epoch)
        sampler.set_epoch(epoch + 1)

    def tag(self, batch: Any, epoch: int) -> Any:
        """Add the pass number to a training batch."""
        if self.sampler.shuffle:  # type: ignore[attr-defined]
            batch["epoch"] = torch.full_like(batch["index"], epoch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and how many of its batches were handed out."""
        sampler = self.sampler
        if not isinstance(sampler, (PositionedSampler, RoleSampler)):
            return {"epoch": 0, "batches": 0}
        return {"epoch": sampler.epoch, "batches": sampler.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the given position at the next iteration."""
        if isinstance(self.sampler, (PositionedSampler, RoleSampler)):
            self.sampler.seek(state_dict["epoch"], state_dict["batches"])
