"""A network that is only asked for gradients of its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torchlethe.components import eval_mode


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for the weights, inside the block."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with eval_mode(network):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
