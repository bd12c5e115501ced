"""Finding, replacing and reading the classifier of any network, ours or somebody else's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchlethe.models.checks import check_count

# Wrappers: our NormalizedClassifier and Lightning modules, DDP, torch.compile, the adapters of transformers.
_WRAPPED = ("network", "module", "_orig_mod", "model", "timm_model")
# ViT and Swin of torchvision, ResNet, our own networks, and the VGG/MobileNet/EfficientNet/ConvNeXt/DenseNet family.
_NAMES = ("heads.head", "head.fc", "head", "fc", "linear", "classifier")


def _find(network: nn.Module, name: str) -> nn.Module | None:
    """Follow a dotted path through registered submodules only (never through properties or methods)."""
    module: nn.Module | None = network
    for part in name.split("."):
        module = module._modules.get(part) if module is not None else None
    return module


def head_name(network: nn.Module) -> str:
    """Find the classifier, the last linear layer of a network.

    Known are the networks of this package, torchvision, timm and transformers, also inside the wrappers
    ``NormalizedClassifier``, ``DistributedDataParallel``, ``torch.compile`` and a Lightning module's ``network``.

    Args:
        network: Any classifier.

    Returns:
        Dotted name of an ``nn.Linear``, for ``network.get_submodule``.

    Raises:
        ValueError: There is none under the usual names.

    >>> from torchlethe.models import resnet20
    >>> head_name(resnet20())
    'linear'
    """
    if _find(network, "head_dist") is not None:
        raise ValueError(f"network {type(network).__name__} averages two classifiers, so it has no single head.")
    for name in _NAMES:
        module = _find(network, name)
        if isinstance(module, nn.Linear):
            return name
        if isinstance(module, nn.Sequential):
            linear = [child for child, layer in module.named_children() if isinstance(layer, nn.Linear)]
            if linear:
                return f"{name}.{linear[-1]}"
    for name in _WRAPPED:
        module = _find(network, name)
        if module is not None:
            return f"{name}.{head_name(module)}"
    if isinstance(network, nn.Linear):
        raise ValueError("network is a single Linear layer, which has no features in front of a head.")
    raise ValueError(
        f"network {type(network).__name__} has no Linear classifier under the names {', '.join(_NAMES)}; "
        "wrap it so that its last layer has one of them."
    )


def head_of(network: nn.Module) -> nn.Linear:
    """Return the classifier of a network (see :func:`head_name`).

    Args:
        network: Any classifier.

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: There is none under the usual names.
    """
    head = network.get_submodule(head_name(network))
    assert isinstance(head, nn.Linear)  # head_name returns nothing else
    return head


def replace_head(network: nn.Module, num_classes: int) -> nn.Module:
    """Give a network a new, randomly initialised classifier, unless the old one already has ``num_classes`` outputs.

    Args:
        network: Changed in place.
        num_classes: Outputs of the classifier, at least 2.

    Returns:
        The same network.

    Raises:
        ValueError: ``num_classes`` is no integer of at least 2, or the network has no known classifier.
    """
    check_count("num_classes", num_classes, 2)
    name = head_name(network)
    old = network.get_submodule(name)
    assert isinstance(old, nn.Linear)
    if old.out_features != num_classes:
        weight = old.weight
        network.set_submodule(
            name,
            nn.Linear(
                old.in_features, num_classes, bias=old.bias is not None, device=weight.device, dtype=weight.dtype
            ),
        )
    return network


def features_of(network: nn.Module, image: Tensor) -> Tensor:
    """Compute what the classifier of a network reads, for any network.

    Networks with the features/head split compute just that; from others the input of the head is taken on its way
    through ``forward`` (with autograd, so that gradients with respect to the image or the weights work).

    Args:
        network: Any classifier.
        image: What its ``forward`` takes, ``(B, C, H, W)``.

    Returns:
        ``(B, D)`` features.

    Raises:
        ValueError: The network has no known classifier, or one that reads something else than one row for each image.
    """
    return network.features(image) if isinstance(network, HeadAccess) else through_head(network, image)[0]


def through_head(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of any network with a known classifier, the features as they pass its head.

    Args and raises as :func:`torchlethe.models.features_and_logits`, which knows shorter ways for some networks.
    """
    seen: list[Tensor] = []
    handle = head_of(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = network(image)
    finally:
        handle.remove()
    if not seen or seen[-1].ndim != 2:
        shape = tuple(seen[-1].shape) if seen else "nothing"
        raise ValueError(f"the head of network {type(network).__name__} must read features (B, D), it read {shape}.")
    return seen[-1], logits


class HeadAccess:
    """Mixin for ``nn.Module``: ``network.head`` is the classifier, and assigning to it replaces the classifier."""

    def features(self, image: Tensor) -> Tensor:
        """Compute what the classifier reads: images ``(B, C, H, W)`` to features ``(B, D)``."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """The classifier."""
        assert isinstance(self, nn.Module)
        return head_of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers every module that is assigned, before properties are looked at: without this line
        # `network.head = layer` would add a second, unused classifier.
        if name == "head" and isinstance(self, nn.Module):
            self.set_submodule(head_name(self), value)
        else:
            super().__setattr__(name, value)
