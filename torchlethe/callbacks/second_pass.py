"""What a second pass over the same batch must not do: log, count, draw other random numbers, or see another batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torchmetrics import Metric


@contextmanager
def muted(pl_module: LightningModule) -> Iterator[None]:
    """Let ``log`` and ``log_dict`` of a module do nothing inside the block."""
    names = ("log", "log_dict")
    own: dict[str, Any] = {name: pl_module.__dict__[name] for name in names if name in pl_module.__dict__}
    try:
        for name in names:
            pl_module.__dict__[name] = _say_nothing
        yield
    finally:
        for name in names:
            pl_module.__dict__.pop(name, None)
        pl_module.__dict__.update(own)


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def uncounted(metrics: Sequence[Metric]) -> Iterator[None]:
    """Put the state of metrics back after the block.

    The same tensors get their old values back, rather than others with these values: the metrics of a
    ``MetricCollection`` share their states.

    Args:
        metrics: the metrics; those inside wrappers have to be among them.
    """
    saved: list[tuple[Metric, dict[str, Any], dict[str, Any]]] = []
    for metric in metrics:
        # states, and the counters that metrics keep beside them
        kept = {k: v for k, v in vars(metric).items() if v is None or isinstance(v, Tensor | list | int | float)}
        saved.append((metric, kept, {name: _copy(value) for name, value in kept.items()}))
    try:
        yield
    finally:
        for metric, kept, values in saved:
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    value.copy_(values[name])
                elif isinstance(value, list):
                    value[:] = values[name]
                metric.__dict__[name] = value


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


class RandomState:
    """The state of every global random number generator that a training step may use.

    Args:
        device: the device whose generator counts, besides the CPU's, NumPy's and Python's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def same_batch(batch: Any) -> Any:
    """A batch with containers of its own and the same tensors: what a step writes into a dict does not reach it."""
    return tree_map(lambda leaf: leaf, batch)


def batch_size_of(batch: Any) -> int:
    """The first dimension that all tensors of a batch share.

    Raises:
        ValueError: there is none.
    """
    sizes = {leaf.shape[0] for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of a batch have {len(sizes)} different first dimensions, so the batch cannot be divided: "
            "use ascent_fraction=1 and, for method='esam', gamma=1."
        )
    return sizes.pop()


def part_of(batch: Any, positions: Tensor | slice) -> Any:
    """The samples of a batch at some positions.

    Args:
        batch: dicts, tuples and lists of tensors ``(B, ...)``, and of lists with one entry a sample, such as prompts.
        positions: a slice, or an index ``(K,)``.

    Raises:
        ValueError: its tensors do not share their first dimension.

    Example:
        >>> part_of({"image": torch.arange(3.0), "prompt": ["a", "b", "c"]}, torch.tensor([2, 0]))
        {'image': tensor([2., 0.]), 'prompt': ['c', 'a']}
    """
    size = batch_size_of(batch)
    chosen = range(size)[positions] if isinstance(positions, slice) else positions.tolist()

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[positions] if value.ndim else value
        if isinstance(value, Mapping):
            return type(value)({key: part(entry) for key, entry in value.items()})  # type: ignore[call-arg]
        if isinstance(value, tuple | list):
            plain = not any(isinstance(entry, Tensor | Mapping | tuple | list) for entry in value)
            entries = [value[i] for i in chosen] if plain and len(value) == size else [part(entry) for entry in value]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        return value

    return part(batch)
