"""Try something out on a network and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Put everything that a trial run changes back, bit for bit, when the block ends; also when it raises.

    That is parameters, buffers, gradients (which are None at the start of the block), each submodule's mode, and the
    states of the random generators of torch (CPU and the network's device), numpy and Python. Optimizers are not looked
    at: a trial makes its own.

    Args:
        network: the network that the block may train. Memory: one copy of its parameters and buffers.
    """
    parameters = list(network.parameters())
    tensors = parameters + [b for part in network.modules() for b in part._buffers.values() if b is not None]
    saved = [tensor.detach().clone() for tensor in tensors]
    owners = [(part, dict(part._buffers), part.training) for part in network.modules()]
    gradients = [p.grad for p in parameters]
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (it is the state of the global generator)
    for p in parameters:
        p.grad = None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for part, buffers, training in owners:
            part._buffers.update(buffers)
            part.training = training
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
