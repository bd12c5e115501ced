"""The memory layout in which a processor's convolutions run fastest."""

from __future__ import annotations

import torch
from torch import nn

FAMILIES = ("torchlethe.", "torchvision.", "timm.")
"""Packages whose networks are known to run in any layout: others may use ``view`` where only one works."""


def wants_channels_last(network: nn.Module) -> bool:
    """Whether a network on a CPU is known to be faster, and to work, with its weights stored channels-last.

    That is a network of this package, of torchvision or of timm in float32 or bfloat16, most of whose weights belong
    to 2-D convolutions. On small ones the gain is within the noise.

    Args:
        network: any network.

    Example:
        >>> from torchlethe.models import MLP, resnet8
        >>> wants_channels_last(resnet8()), wants_channels_last(MLP())
        (True, False)
    """
    if not torch.backends.mkldnn.is_available():
        return False
    for module in network.modules():
        leaf = type(module).__module__.startswith("torch.nn.")
        if not leaf and not type(module).__module__.startswith(FAMILIES):
            return False
    convolutions = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    weights = list(network.parameters())
    if not convolutions or any(p.dtype not in (torch.float32, torch.bfloat16) for p in weights):
        return False
    return sum(p.numel() for p in convolutions) > sum(p.numel() for p in weights) / 2


def channels_last_on_cpu(network: nn.Module) -> nn.Module:
    """Store a network's convolution weights channels-last, in place, where :func:`wants_channels_last`.

    Images need no change: a convolution takes its layout from its weights. Results differ by rounding.

    Args:
        network: a network that will run on a CPU.

    Returns:
        The network.
    """
    return network.to(memory_format=torch.channels_last) if wants_channels_last(network) else network
