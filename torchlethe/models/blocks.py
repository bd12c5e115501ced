"""The blocks of any network in their order, for methods that freeze all but the last ones."""

from __future__ import annotations

from torch import nn

from torchlethe.models.heads import head_name

_OPENED_SHARE = 0.9


def block_names(network: nn.Module) -> list[str]:
    """Name the parts of a network that hold weights, in the order in which they were registered, without the head.

    Sequences (``nn.Sequential``, ``nn.ModuleList``) and parts with more than 90 % of the network's weights, such as
    wrappers and a transformer's encoder, are opened; what remains is a block: a residual or transformer block, a
    convolution, a hidden layer. A normalisation layer belongs to the block before it and is not named.

    Args:
        network: any classifier whose head :func:`~torchlethe.models.head_name` finds.

    Returns:
        Dotted names for ``network.get_submodule``.

    Raises:
        ValueError: the network has no known head.

    >>> from torchlethe.models import SmallCNN, resnet20
    >>> block_names(SmallCNN())
    ['conv1', 'conv2', 'hidden']
    >>> block_names(resnet20())[-1]
    'layer3.2'
    """
    return [group[0] for group in _groups(network)]


def last_blocks(network: nn.Module, count: int) -> list[str]:
    """Name the last blocks of a network, their normalisation layers, and the head.

    Args:
        network: any classifier, see :func:`block_names`.
        count: blocks in front of the head, at least 0.

    Returns:
        Dotted names for ``network.get_submodule``; none lies inside another.

    Raises:
        ValueError: there are not so many blocks, or the network has no known head.

    >>> from torchlethe.models import SmallCNN
    >>> last_blocks(SmallCNN(), 2)
    ['conv2', 'bn2', 'hidden', 'linear']
    """
    groups = _groups(network)
    if not 0 <= count <= len(groups):
        raise ValueError(
            f"blocks is {count}, but the network has {len(groups)} in front of its head: 0 to {len(groups)}."
        )
    last = groups[len(groups) - count :]
    return [name for group in last for name in group] + [head_name(network)]


def _groups(network: nn.Module) -> list[list[str]]:
    head = head_name(network)
    total = _weights(network)
    groups: list[list[str]] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            size = _weights(child)
            if not size or name == head:
                continue
            around_head = head.startswith(f"{name}.")
            opened = isinstance(child, nn.Sequential | nn.ModuleList) or size > _OPENED_SHARE * total
            if around_head or (opened and any(_weights(part) for part in child.children())):
                walk(child, f"{name}.")
            elif "norm" in type(child).__name__.lower() and groups:
                groups[-1].append(name)
            else:
                groups.append([name])

    walk(network, "")
    return groups


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
