"""What families of modules share around the Trainer's loops: an optimizer that counts batches, data in stored order."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler


class StepCounter(torch.optim.Optimizer):
    """An optimizer that changes nothing: stepping it once a batch makes Lightning count one ``global_step`` a batch."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        """Run the closure, when there is one."""
        return closure() if closure is not None else None


def in_order(loader: Any, trainer: Trainer) -> Any:
    """A stock loader's data in stored order, each rank its share; a loader of another kind as it is.

    Random transforms inside the data set cannot be switched off from here.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return loader
    sampler: Any = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    if trainer.world_size > 1:
        sampler = DistributedSampler(loader.dataset, trainer.world_size, trainer.global_rank, shuffle=False)
    return DataLoader(
        loader.dataset, loader.batch_size, sampler=sampler, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )
