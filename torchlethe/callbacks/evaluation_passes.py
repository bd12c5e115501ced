"""Passing evaluation sets through a module inside a running Trainer, without a trace in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler

from torchlethe.components import eval_mode
from torchlethe.data import PADDING_LABEL, as_batch, unit_range
from torchlethe.functional.uncertainty import drop_padding
from torchlethe.io import load_weights
from torchlethe.metrics.evaluation import Outputs
from torchlethe.metrics.passes import gather_rows, own_batches
from torchlethe.metrics.roles import distinct_rows

REQUIRED = ("forget", "remain", "test")
"""The sets that an evaluation cannot do without."""


def check_complete(loaders: Mapping[str, Any]) -> None:
    """Check that no set of :data:`REQUIRED` is missing.

    Args:
        loaders: data loaders by set name.

    Raises:
        ValueError: a set is missing.
    """
    missing = [name for name in REQUIRED if name not in loaders]
    if missing:
        raise ValueError(f"the evaluation lacks the sets {', '.join(missing)}, it needs {', '.join(REQUIRED)}.")


def check_loaders(loaders: Mapping[str, Any]) -> None:
    """Check data loaders that a user gave: no set is missing and none comes in a random order.

    Args:
        loaders: data loaders by set name.

    Raises:
        ValueError: a set is missing, or a loader shuffles.
    """
    for name, loader in loaders.items():
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, RandomSampler) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise ValueError(f"loaders[{name!r}] is shuffled; evaluation needs a fixed order, use shuffle=False.")
    check_complete(loaders)


def check_weights(
    trainer: Trainer, pl_module: LightningModule, argument: str, path: Path, attribute: str = "network"
) -> None:
    """Check that a weight file can be borrowed for a pass.

    Args:
        trainer: the running Trainer.
        pl_module: the module of which a part is to take the weights.
        argument: the name that the user knows the file by, for the message.
        path: the weight file.
        attribute: the name of that part.

    Raises:
        ValueError: the file does not exist, the module has no such part, or its network is sharded.
    """
    if not path.is_file():
        raise ValueError(f"{argument}='{path}' does not exist.")
    if not isinstance(getattr(pl_module, attribute, None), nn.Module):
        raise ValueError(f"{argument}='{path}' needs a module with a '{attribute}' to load the weights into.")
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(f"{argument}='{path}' cannot be loaded beside a sharded network, evaluate it with DDP.")


def collect_outputs(
    trainer: Trainer,
    pl_module: LightningModule,
    loaders: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] | None = None,
    weights: Path | None = None,
    attribute: str = "network",
) -> dict[str, Outputs]:
    """Pass evaluation sets through the module once: in eval mode, without gradients, in the Trainer's precision.

    The module's modes, its network and the random generators are as before afterwards, also after an error. A
    ``fast_dev_run`` passes that many batches of each set.

    Args:
        trainer: the running Trainer.
        pl_module: its ``forward(image)`` gives logits (B, K).
        loaders: data loaders by set name, in a fixed order; without them the datamodule's ``evaluation_loaders()`` and,
            where it has one, its ``prepare_batch``.
        names: sets to pass, all by default.
        weights: file to load into a copy of a part of the module for these passes.
        attribute: the name of that part.

    Returns:
        The outputs by set name, ordered by the samples' index. Under DDP each rank passes its share, and the outputs
        are complete on rank 0 and empty elsewhere.

    Raises:
        ValueError: a required set is missing, a set is empty, or ``forward`` gives something else than logits.
    """
    # an iterator over a DataLoader draws from the global generator; training must not notice
    with isolate_rng(), torch.no_grad(), eval_mode(pl_module), borrowed_weights(pl_module, weights, attribute):
        found, prepare = evaluation_sets(trainer, loaders)
        check_complete(found)
        chosen = {name: loader for name, loader in found.items() if names is None or name in names}
        return {name: _pass(trainer, pl_module, name, loader, prepare) for name, loader in chosen.items()}


def evaluation_sets(
    trainer: Trainer, loaders: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], Callable[..., Any]]:
    """The loaders of the evaluation sets, and what prepares their batches.

    Args:
        trainer: the running Trainer.
        loaders: those that the user gave; without them the datamodule's ``evaluation_loaders()``.

    Returns:
        Loaders by set name, and a function of a batch and a device that gives a dict with ``image`` and ``label``.
    """
    if loaders is not None:
        return loaders, plain_batch
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule.evaluation_loaders(), getattr(datamodule, "prepare_batch", plain_batch)


def plain_batch(batch: Any, device: torch.device) -> dict[str, Any]:
    """Prepare a batch of data that bring no ``prepare_batch`` of their own.

    Args:
        batch: what :func:`torchlethe.data.as_batch` reads.
        device: where the module is.

    Returns:
        A dict with ``image`` (uint8 divided by 255, anything else as it is) and ``label``, on the device.

    Example:
        >>> batch = (torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([3]))
        >>> plain_batch(batch, torch.device("cpu"))["image"].max().item()
        1.0
    """
    moved = move_data_to_device(as_batch(batch), device)
    return {**moved, "image": unit_range(moved["image"])}


@contextmanager
def borrowed_weights(pl_module: LightningModule, weights: Path | None, attribute: str = "network") -> Iterator[None]:
    """Inside the block, a part of the module is a copy of itself in eval mode with the weights of a file.

    Args:
        pl_module: a module with such a part; it gets the very same object back.
        weights: file for :func:`torchlethe.io.load_weights`; nothing happens without one.
        attribute: the name of the part.
    """
    if weights is None:
        yield
        return
    own: nn.Module = getattr(pl_module, attribute)
    setattr(pl_module, attribute, load_weights(copy.deepcopy(own), weights).eval())
    try:
        yield
    finally:
        setattr(pl_module, attribute, own)


def _pass(trainer: Trainer, pl_module: LightningModule, name: str, loader: Any, prepare: Callable[..., Any]) -> Outputs:
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
    rank, world = trainer.global_rank, trainer.world_size
    for raw, positions, repeated in own_batches(loader, rank, world, count=batch_count, limit=limit):
        batch = prepare(raw, pl_module.device)
        logits, label = _logits(trainer, pl_module, name, batch).cpu(), batch["label"].cpu()
        index = batch.get("index", positions).cpu()
        keep = (label != PADDING_LABEL) & (index >= 0) & (not repeated)
        logits, label = drop_padding(logits[keep], label[keep])
        parts.append((logits if logits.dtype == torch.float64 else logits.float(), label, index[keep]))
    if not parts:
        raise ValueError(f"the evaluation set '{name}' is empty.")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if world == 1:
        rows = columns[2].argsort(stable=True)
    else:
        keep_here, device = trainer.is_global_zero, trainer.strategy.root_device
        columns = [gather_rows(c, trainer.strategy.all_gather, keep=keep_here, device=device) for c in columns]
        rows = distinct_rows(columns[2])
    return Outputs(*(column[rows] for column in columns))


def _logits(trainer: Trainer, pl_module: LightningModule, name: str, batch: dict[str, Any]) -> Tensor:
    image, label = trainer.precision_plugin.convert_input(batch["image"]), batch["label"]
    with trainer.precision_plugin.forward_context():
        logits = pl_module(image)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or label.shape != logits.shape[:1]:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{type(pl_module).__name__}.forward(image) must give logits ({len(image)}, classes) for the "
            f"labels {tuple(label.shape)} of the set '{name}', got {got}."
        )
    return logits


def batch_count(batch: Any) -> int:
    """How many samples a batch holds, padding included."""
    return len(as_batch(batch)["label"])
