"""Train and eval mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
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


@contextmanager
def frozen_statistics(layers: Iterable[nn.Module], how: Literal["bn", "buffers", "none"] = "bn") -> Iterator[None]:
    """Leave running statistics alone inside the block; layers in train mode go on normalising with the batch.

    Args:
        layers: the modules to look at, for example ``network.modules()``.
        how: ``bn`` switches the tracking of BatchNorm, SyncBatchNorm and InstanceNorm off, so that not even the batch
            counter moves; a compiled network has one graph for each of the two settings. ``buffers`` puts every buffer
            back afterwards, which also serves spectral norm, queues and teachers, and needs one graph. ``none`` does
            nothing.
    """
    layers = list(layers)
    tracking = [m for m in layers if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    tracking = [m for m in tracking if m.track_running_stats] if how == "bn" else []
    own = [(layer, name) for layer in layers for name in layer._buffers] if how == "buffers" else []
    saved = [(layer, name, buffer.clone()) for layer, name in own if (buffer := layer._buffers[name]) is not None]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
        for part, name, value in saved:
            if (buffer := part._buffers[name]) is not None and buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                part._buffers[name] = value


def normalisation_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The affine parameters of normalisation layers: every module whose class name contains "norm".

    Args:
        module: the network, with all its submodules.
    """
    return {
        param
        for part in module.modules()
        if "norm" in type(part).__name__.lower()
        for param in part.parameters(recurse=False)
    }


@contextmanager
def gradients_on() -> Iterator[None]:
    """Autograd on inside the block, also within ``torch.no_grad`` and ``torch.inference_mode``.

    Lightning's ``predict`` and ``test`` run under inference mode. Tensors made there stay inference tensors, which
    autograd refuses to save: clone them inside the block.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
