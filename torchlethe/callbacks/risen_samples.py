"""ESAM's choice of samples for the second pass: those whose loss rises most on the way to w + ε."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from torchlethe.callbacks.second_pass import part_of
from torchlethe.data import as_batch, unit_range

SampleLosses = Callable[[LightningModule, Any], Tensor]


def cross_entropy_losses(pl_module: LightningModule, batch: Any) -> Tensor:
    """Cross-entropy ``(B,)`` of the module's ``forward`` for a batch of images and labels.

    Args:
        pl_module: the module; ``forward(image)`` gives logits.
        batch: a dict with ``image`` and ``label``, or a tuple of these.
    """
    return cross_entropy_of(pl_module(unit_range(as_batch(batch)["image"])), batch)


def cross_entropy_of(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy ``(B,)`` of logits ``(B, C)`` for the labels of a batch, without gradient."""
    return nn.functional.cross_entropy(logits.detach().float(), as_batch(batch)["label"], reduction="none")


@contextmanager
def collected_logits(pl_module: LightningModule, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Collect the logits ``(B, C)`` that a module's ``forward`` gives inside the block; none unless they are wanted."""
    if not wanted:
        yield []
        return
    found: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 2:
            found.append(output.detach())

    handle = pl_module.register_forward_hook(collect)
    try:
        yield found
    finally:
        handle.remove()


def most_risen(batch: Any, rise: Tensor, share: float) -> Any:
    """The samples of a batch whose loss rose most; at least one.

    Args:
        batch: the batch of B samples.
        rise: ``(B,)``.
        share: of the samples, in (0, 1].
    """
    return part_of(batch, rise.topk(max(1, int(len(rise) * share))).indices)
