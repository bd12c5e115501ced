"""The training and test samples of a run, as an evaluation at its end wants them: in stored order, not augmented."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from torchlethe.callbacks.evaluation_passes import plain_batch
from torchlethe.data import PADDING_LABEL, as_batch, model_input
from torchlethe.data.wrapped import innermost, replace_transform
from torchlethe.functional.group_sharpness import groups_of
from torchlethe.metrics.passes import own_batches

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """A set of samples and how its batches become images and labels on the device.

    Attributes:
        loader: yields batches.
        prepare: brings one to the device.
        dataset: the loader's map-style data set with deterministic transforms, by which samples are shared out;
            ``None`` where the loader is read as it is.
        positions: the samples of ``dataset`` that count, in order.
    """

    loader: Any
    prepare: Callable[[Any], Any]
    dataset: Any = None
    positions: Tensor | None = None

    def batches(self, rank: int, world: int, limit: int | None = None) -> Iterator[Pair]:
        """One rank's share of all samples, each exactly once over all ranks.

        Args:
            rank: this rank.
            world: number of ranks.
            limit: at most so many batches for each rank.

        Yields:
            Images (B, C, H, W) and labels (B,) int64 without padding, on the device.
        """
        if self.positions is not None:
            for number, batch in enumerate(self._read(self.positions[rank::world])):
                if limit is not None and number >= limit:
                    return
                yield self._pair(batch)
            return
        for batch, positions, repeated in own_batches(self.loader, rank, world, count=_count, limit=limit):
            image, label = self._pair(batch, positions >= 0)
            if not repeated and len(label):
                yield image, label

    def groups(self, samples: int | None, size: int, seed: int, rank: int, world: int) -> list[Pair]:
        """One rank's groups of consecutive samples of a fixed subset; rank r has each W-th group, from the r-th on.

        Args:
            samples: size of the subset, a random one of a map-style data set and the first of any other; ``None``
                for all.
            size: samples in a group.
            seed: of the subset.
            rank: this rank.
            world: number of ranks.

        Returns:
            As :meth:`batches`, in order; joined and cut every ``size`` samples these are the groups.
        """
        if self.positions is None:
            pairs = _first((self._pair(batch) for batch in self.loader), samples)
            groups = enumerate(groups_of(pairs, size))
            return [piece for number, group in groups if number % world == rank for piece in group]
        positions = self.positions
        if samples is not None and samples < len(positions):
            order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
            positions = positions[order[:samples].sort().values]
        own = positions.split(size)[rank::world]
        return [self._pair(batch) for batch in self._read(torch.cat(own))] if own else []

    def _read(self, positions: Tensor) -> Iterable[Any]:
        loader = self.loader
        return DataLoader(
            Subset(self.dataset, positions.tolist()),
            batch_size=loader.batch_size or 64,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            pin_memory=loader.pin_memory,
        )

    def _pair(self, batch: Any, keep: Tensor | None = None) -> Pair:
        prepared = model_input(self.prepare(batch))
        image, label = prepared["image"], prepared["label"]
        real = label != PADDING_LABEL
        if keep is not None:
            real &= keep.to(real.device)
        return (image, label) if bool(real.all()) else (image[real], label[real])


def find_train_source(trainer: Trainer, pl_module: LightningModule, loaders: Mapping[str, Any] | None) -> Source:
    """The training samples: of ``loaders['train']``, of one of Lethe's datamodules, else of the Trainer's loader.

    Args:
        trainer: the running Trainer.
        pl_module: its module.
        loaders: what the user gave.

    Returns:
        The samples with deterministic transforms, as far as one can tell: a data set of the test set's class gets its
        transform.

    Raises:
        ValueError: there is none, or there are several loaders.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    prepare: Callable[[Any], Any] = partial(_transfer, trainer)
    if loaders and "train" in loaders:
        loader, prepare = loaders["train"], partial(plain_batch, device=pl_module.device)
    elif hasattr(datamodule, "role_loader"):
        loader = datamodule.role_loader("train")
    elif hasattr(datamodule, "eval_loader") and hasattr(datamodule, "train_set"):
        loader = datamodule.eval_loader(datamodule.train_set)
    else:
        loader = trainer.train_dataloader
    several = isinstance(loader, Mapping) or (isinstance(loader, list | tuple) and isinstance(loader[0], DataLoader))
    if loader is None or several:
        found = "found several training loaders" if several else "found no training data"
        raise ValueError(f"SharpnessEvaluation {found}: pass it loaders={{'train': …}}, batches of images and labels.")
    positions = _positions(loader)
    if positions is None:
        return Source(loader, prepare)
    dataset = loader.dataset
    test = find_test_source(trainer, pl_module, loaders)
    if test is not None and getattr(test.loader, "dataset", None) is not None:
        dataset = replace_transform(dataset, innermost(test.loader.dataset))
    return Source(loader, prepare, dataset, positions)


def set_up_test_data(trainer: Trainer, loaders: Mapping[str, Any] | None) -> None:
    """Let a datamodule of another project set up its test set in a fit too (Lethe's always do).

    Args:
        trainer: the Trainer, whose datamodule is set up for the fit.
        loaders: what the user gave; nothing is done where the test set is among it.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    lethes = hasattr(datamodule, "role_loader") or hasattr(datamodule, "eval_loader")
    if datamodule is not None and not lethes and "test" not in (loaders or {}):
        datamodule.setup("test")


def find_test_source(trainer: Trainer, pl_module: LightningModule, loaders: Mapping[str, Any] | None) -> Source | None:
    """The test samples: of ``loaders['test']``, of the running test, else of datamodule or module.

    Args:
        trainer: the running Trainer.
        pl_module: its module.
        loaders: what the user gave.

    Returns:
        The samples; ``None`` where there are none, or several test loaders.
    """
    if loaders and "test" in loaders:
        return Source(loaders["test"], partial(plain_batch, device=pl_module.device))
    datamodule: Any = getattr(trainer, "datamodule", None)
    if trainer.state.fn is TrainerFn.TESTING:
        loader = trainer.test_dataloaders
    elif datamodule is not None and is_overridden("test_dataloader", datamodule):
        loader = datamodule.test_dataloader()
    elif is_overridden("test_dataloader", pl_module):
        loader = pl_module.test_dataloader()
    else:
        loader = None
    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, Mapping | list | tuple):
        if loader:
            rank_zero_warn("SharpnessEvaluation leaves out several test loaders: pass it loaders={'test': …}.")
        return None
    return None if loader is None else Source(loader, partial(_transfer, trainer))


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, for data sets with random transforms.

    Args:
        seed: the seed. The state from before is lost: use Lightning's ``isolate_rng`` around it.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that others' transforms use)
    torch.manual_seed(seed)


def _positions(loader: Any) -> Tensor | None:
    """The samples of a loader's map-style data set that it draws from; ``None`` where it has no such set."""
    dataset: Any = getattr(loader, "dataset", None)
    readable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not isinstance(loader, DataLoader) or not readable or isinstance(dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return None  # the data set yields whole batches
    sampler = getattr(
        getattr(loader.sampler, "dataset", None), "_sampler", loader.sampler
    )  # Lightning wraps it for DDP
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(sorted(sampler.indices))
    return torch.arange(len(dataset))


def _transfer(trainer: Trainer, batch: Any) -> Any:
    """Bring a batch to the device by the hooks of datamodule and module, as Lightning does in validation."""
    stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage


def _first(pairs: Iterable[Pair], samples: int | None) -> Iterator[Pair]:
    """Pairs until so many samples are reached."""
    for image, label in pairs:
        yield (image, label) if samples is None else (image[:samples], label[:samples])
        if samples is not None and (samples := samples - len(label)) <= 0:
            return


def _count(batch: Any) -> int:
    return len(as_batch(batch)["label"])
