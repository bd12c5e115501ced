"""Networks of torchvision and timm, with the classifier that the data needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchlethe.models.checks import check_count, unknown_name
from torchlethe.models.heads import replace_head


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse code: torchvision itself does not ask for that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _OptionError(ValueError):
    """A builder does not know an option."""


@contextmanager
def _named_options(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Say which options were given when a builder refuses one."""
    try:
        yield
    except TypeError as error:
        raise _OptionError(f"options {dict(arguments)} do not suit the network {name!r}: {error}.") from error


def _torchvision_weights(name: str, pretrained: bool | str) -> Any:
    """Look up a torchvision weights entry, or ``None`` for a random network."""
    from torchvision import models

    if pretrained is False:
        return None
    entries = models.get_model_weights(name)
    wanted = "DEFAULT" if pretrained is True else str(pretrained)
    if wanted not in entries.__members__:
        raise unknown_name("pretrained", wanted, entries.__members__)
    return entries[wanted]


def torchvision_network(
    name: str,
    num_classes: int,
    pretrained: bool | str = False,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a classifier of torchvision and give it a new head for ``num_classes``.

    The result is torchvision's own module with its own key names, so weights of others load. Its head is found by
    :func:`~torchlethe.models.head_of` (``heads.head`` of ViT, ``head`` of Swin, ``fc`` of ResNet, the last layer of
    ``classifier`` of VGG, MobileNet, EfficientNet, ConvNeXt …), its features by :func:`~torchlethe.models.features_of`.
    Auxiliary classifiers of GoogLeNet and Inception are left out, so that ``forward`` always returns logits.
    Pretrained networks expect ImageNet statistics: wrap them in :func:`~torchlethe.models.normalized`.

    Args:
        name: Name in torchvision's classification list, for example ``resnet50``, ``swin_t``, ``vit_b_16``.
        num_classes: Number of classes, at least 2; a pretrained head that already fits is kept.
        pretrained: ``False`` for random weights, ``True`` for torchvision's default ones, or the name of others
            (``IMAGENET1K_V1``); downloaded on first use, opened with ``weights_only=True``.
        image_size: Height and width in pixels, for the ViTs only (other networks take any size); pretrained position
            embeddings are interpolated.
        options: More keyword arguments of torchvision's builder, such as ``dropout``.

    Returns:
        The network.

    Raises:
        ValueError: Unknown name, weights or option, an ``image_size`` for a network that has none, or a head that is
            not Linear (SqueezeNet).
        RuntimeError: The weights could not be downloaded or read.

    >>> from torchlethe.models import head_name
    >>> head_name(torchvision_network("resnet18", num_classes=7))
    'fc'
    """
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    check_count("num_classes", num_classes, 2)
    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("name", name, known)
    weights = _torchvision_weights(name, pretrained)
    arguments = dict(options or {})
    if image_size is not None:
        if not name.startswith("vit_"):
            raise ValueError(f"image_size is for the ViTs of torchvision only, {name} takes any size: leave it out.")
        arguments["image_size"] = check_count("image_size", image_size)
    if weights is None:
        if name in ("googlenet", "inception_v3"):
            arguments = {"aux_logits": False, "init_weights": True, **arguments}
        with _named_options(name, arguments):
            network = models.get_model(name, weights=None, **arguments)
        return replace_head(network, num_classes)
    try:
        with _named_options(name, arguments), _weights_only():
            if image_size is None:
                network = models.get_model(name, weights=weights, **arguments)
            else:
                network = models.get_model(name, weights=None, **arguments)
                tensors = weights.get_state_dict(progress=True, check_hash=True)
                patch_size = network.patch_size
                network.load_state_dict(interpolate_embeddings(image_size, patch_size, tensors))
    except _OptionError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the weights {weights} of torchvision's {name} could not be fetched from {weights.url} or read "
            f"({type(error).__name__}: {error})."
        ) from error
    if name == "inception_v3":
        network.aux_logits, network.AuxLogits = False, None
    return replace_head(network, num_classes)


def timm_network(
    name: str,
    num_classes: int,
    pretrained: bool = False,
    in_channels: int = 3,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a classifier of timm with a head for ``num_classes``.

    The result is timm's own module; :func:`~torchlethe.models.head_of` and :func:`~torchlethe.models.features_of` find
    its head and features. The statistics that pretrained weights expect are in its ``default_cfg``: wrap it in
    :func:`~torchlethe.models.normalized`.

    Args:
        name: Name in ``timm.list_models()``, or ``hf-hub:…`` or ``local-dir:…`` as timm understands them.
        num_classes: Number of classes, at least 2.
        pretrained: Whether to load timm's pretrained weights (from the Hugging Face hub, kept in its cache).
        in_channels: Channels of the images.
        options: More keyword arguments of ``timm.create_model``, such as ``img_size`` or ``drop_path_rate``.

    Returns:
        The network.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: Unknown name or option.
        RuntimeError: The weights could not be fetched.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name!r} needs timm, install it with: pip install 'torchlethe[timm]'") from error
    check_count("num_classes", num_classes, 2)
    check_count("in_channels", in_channels)
    if ":" not in name and not timm.is_model(name):
        raise unknown_name("name", name, timm.list_models())
    arguments = {"num_classes": num_classes, "in_chans": in_channels, **(options or {})}
    try:
        with _named_options(name, arguments):
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:
        if isinstance(error, _OptionError) or not pretrained:
            raise
        raise RuntimeError(
            f"the weights of timm's {name} could not be fetched or read ({type(error).__name__}: {error})."
        ) from error
