"""Frozen copies of the original network: the teachers that unlearning methods compare with."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchlethe.components.distributed import world_size


def frozen_copy(network: nn.Module) -> nn.Module:
    """An eval-mode copy whose weights take no gradient.

    Args:
        network: any network; compiled ones are copied without their compiled code.

    Returns:
        The copy, on the same device and in the same precision and memory layout.
    """
    return copy.deepcopy(network).requires_grad_(False).eval()


def randomised_copy(network: nn.Module, seed: int = 0) -> nn.Module:
    """A frozen copy that knows nothing: every layer is initialised anew.

    Layers draw their weights as when they are built (``reset_parameters``), BatchNorm has its initial statistics, and
    parameters that a module keeps by itself (class tokens, position embeddings) come from N(0, 0.02²). Other buffers,
    such as a normalisation's mean, stay.

    Args:
        network: the network whose architecture is copied.
        seed: the weights are a function of the architecture and this seed, on every device.

    Returns:
        The copy, in eval mode, on the device and in the precision of ``network``.
    """
    copied = copy.deepcopy(network)
    like = {name: tensor.device for name, tensor in copied.state_dict().items()}
    place = next(iter(like.values()), torch.device("cpu"))
    copied = copied.cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in copied.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return copied.to(place).requires_grad_(False).eval()


def matched(copied: nn.Module, network: nn.Module) -> nn.Module:
    """Bring a copy to the device and precision of a network, and give every rank the weights of rank 0."""
    example = next((p for p in network.parameters() if p.is_floating_point()), None)
    if example is not None:
        copied.to(device=example.device, dtype=example.dtype)
    if world_size() > 1:
        for tensor in [*copied.parameters(), *copied.buffers()]:
            dist.broadcast(tensor.detach(), 0)
    return copied


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over a network's parameters and buffers, by name."""
    return tensors_hash(network.state_dict())


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over tensors, by name, whatever their device and memory layout."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
