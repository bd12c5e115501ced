"""Train and eval mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each submodule has its own mode back.

    A method may hold BatchNorm in eval mode while it trains the rest, so one flag for all would not do.

    Args:
        module: the module, with all its submodules.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def batch_norm_in_eval(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics, and leave them alone, inside the block.

    Args:
        network: the network; layers that already are in eval mode stay there afterwards.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
