"""Convolutions that carry the BatchNorm behind them: exact in eval mode, and one pass over the activations less."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from torchlethe.components.modes import gradients_on

Pairs = list[tuple[str, str]]
"""Names of convolutions, each with that of the BatchNorm behind it."""


def foldable_pairs(network: nn.Module, image: Tensor) -> Pairs:
    """Find the convolutions whose output nothing reads but a BatchNorm.

    The pairs are seen in a forward pass. In it each convolution's output carries a zero that is taken off in front of
    the BatchNorm, so that autograd tells whose output reaches the result on another way, such as a shortcut.

    Args:
        network: any network; it is not changed.
        image: (B, C, H, W) floating images for the pass.

    Returns:
        The pairs; none where the network cannot run without these BatchNorms.
    """
    trial = copy.deepcopy(network).eval()
    with gradients_on():
        pairs = _adjacent(trial, image.detach().clone())
    with torch.no_grad():
        try:
            found = _tensors(functional_call(folded_network(trial, pairs), folded_weights(trial, pairs), (image,)))
        except Exception:  # a network may look into its BatchNorm
            return []
        same = all(torch.allclose(a, b, 1e-2, 1e-3) for a, b in zip(found, _tensors(trial(image)), strict=True))
    return pairs if same else []


def _adjacent(network: nn.Module, image: Tensor) -> Pairs:
    """Pairs of modules called once each, the one's output being read by the other alone."""
    names = {module: name for name, module in network.named_modules()}
    calls: Counter[nn.Module] = Counter()
    zeros: dict[nn.Module, Tensor] = {}
    marked: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # holds the tensors, so that no id is used twice
    found: list[tuple[nn.Module, nn.Module]] = []

    def mark(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls[module] += 1
        zeros[module] = output.new_zeros((), requires_grad=True)
        with_zero = output + zeros[module]
        marked[id(with_zero)] = (module, output, with_zero)
        return with_zero

    def take_off(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        calls[module] += 1
        if not inputs or id(inputs[0]) not in marked:
            return None
        convolution, output, _ = marked[id(inputs[0])]
        found.append((convolution, module))
        return (output, *inputs[1:])

    handles = [m.register_forward_hook(mark) for m in network.modules() if isinstance(m, _ConvNd)]
    handles += [m.register_forward_pre_hook(take_off) for m in network.modules() if isinstance(m, _BatchNorm)]
    try:
        outputs = _tensors(network(image))
    finally:
        for handle in handles:
            handle.remove()
    candidates = [(a, b) for a, b in found if calls[a] == calls[b] == 1 and b.running_var is not None]
    if not candidates:
        return []
    total = torch.stack([output.float().sum() for output in outputs]).sum()
    if not total.requires_grad:
        return [(names[a], names[b]) for a, b in candidates]
    reached = torch.autograd.grad(total, [zeros[a] for a, _ in candidates], allow_unused=True)
    return [(names[a], names[b]) for (a, b), grad in zip(candidates, reached, strict=True) if grad is None]


def _tensors(output: Any) -> list[Tensor]:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else [output]
    )
    return [value for value in values if isinstance(value, Tensor)]


def folded_network(network: nn.Module, pairs: Pairs) -> nn.Module:
    """A frozen copy in eval mode without the BatchNorms of the pairs; its convolutions have biases.

    Args:
        network: the architecture.
        pairs: see :func:`foldable_pairs`.

    Returns:
        The copy; its weights are meant to be replaced by :func:`folded_weights`.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        folded.set_submodule(norm_name, nn.Identity())
    return folded


@torch.no_grad()
def folded_weights(network: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """Parameters and buffers for the network that :func:`folded_network` makes.

    Args:
        network: the network with its own weights, not changed.
        pairs: see :func:`foldable_pairs`.

    Returns:
        Tensors by name, without gradients; those that are not folded are the network's own (not copies).
    """
    tensors: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: value.detach() for name, value in tensors.items()}
    for conv_name, norm_name in pairs:
        conv: Any = network.get_submodule(conv_name)
        norm: Any = network.get_submodule(norm_name)
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
            transpose=isinstance(conv, _ConvTransposeNd),
        )
        tensors[f"{conv_name}.weight"], tensors[f"{conv_name}.bias"] = weight.detach(), bias.detach()
        for name in [name for name in tensors if name.startswith(f"{norm_name}.")]:
            del tensors[name]
    return tensors
