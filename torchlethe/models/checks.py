"""Checks of what the user gave; each failure is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Args:
        name: Name of the argument, for the message.
        value: What the user gave.
        minimum: Smallest allowed value.

    Returns:
        The value.

    Raises:
        ValueError: The value is no integer or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return value


def check_image(image: Tensor, in_channels: int, minimum_size: int = 1, exact_size: int | None = None) -> None:
    """Refuse, in a sentence, a batch of images that a network cannot take.

    Args:
        image: Batch ``(B, C, H, W)``.
        in_channels: The ``C`` that the network was built for.
        minimum_size: Smallest allowed height and width, in pixels.
        exact_size: The only allowed height and width, in pixels; ``None`` allows every size from ``minimum_size``.

    Raises:
        TypeError: The images are integers (bytes that no datamodule has brought to [0, 1]).
        ValueError: Wrong number of dimensions or channels, or an image of the wrong size.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be a floating-point tensor with values in [0, 1], got {image.dtype}.")
    if image.ndim != 4:
        raise ValueError(f"image must have the shape (B, C, H, W), got {tuple(image.shape)}.")
    channels, height, width = image.shape[1:]
    if channels != in_channels:
        raise ValueError(f"image has {channels} channels, but the network was built with in_channels={in_channels}.")
    if exact_size is not None and (height != exact_size or width != exact_size):
        raise ValueError(f"image is {height}×{width} pixels, but the network was built with image_size={exact_size}.")
    if min(height, width) < minimum_size:
        raise ValueError(
            f"image is {height}×{width} pixels, but this network needs at least {minimum_size}×{minimum_size}."
        )


def unknown_name(argument: str, value: str, known: Iterable[str]) -> ValueError:
    """Build the error for a name that does not exist, with up to three that are spelled alike.

    Args:
        argument: The argument that holds the name.
        value: What the user gave.
        known: All names.

    Returns:
        The error, to be raised.
    """
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(names[:12])} …"
    return ValueError(f"{argument} {value!r} is unknown: {hint}")
