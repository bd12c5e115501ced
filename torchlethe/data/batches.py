"""The batch format: a dict with ``image``, ``label`` and ``index``; what padding looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlethe.functional.uncertainty import PADDING_LABEL as PADDING_LABEL

PADDING_INDEX = -1
"""Index of a padding duplicate: no sample of a training set has it."""

_ALIASES = {"image": ("img", "pixel_values", "images"), "label": ("labels", "target", "fine_label")}
IMAGE_KEYS = ("image", *_ALIASES["image"])


def as_batch(batch: Any) -> dict[str, Any]:
    """Bring a batch of somebody else's data loader into the form that every Lethe module reads.

    Args:
        batch: A dict with ``image`` and ``label`` (or the Hugging Face names ``img``, ``pixel_values``, ``labels``),
            returned with all its other entries, or a sequence whose first two items are images and labels.

    Returns:
        A dict with at least ``image`` (B, C, H, W) and ``label`` (B,).

    Raises:
        ValueError: If images and labels cannot be told apart in ``batch``.

    >>> import torch
    >>> sorted(as_batch((torch.zeros(2, 1, 8, 8), torch.tensor([3, 4]))))
    ['image', 'label']
    """
    if isinstance(batch, Mapping):
        if "image" in batch and "label" in batch:
            return batch if isinstance(batch, dict) else dict(batch)
        found = dict(batch)
        for name, aliases in _ALIASES.items():
            key = next((key for key in (name, *aliases) if key in found), None)
            if key is None:
                raise ValueError(f"batch has the keys {sorted(map(str, batch))}, but needs `image` and `label`.")
            found[name] = found.pop(key)
        return found
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
        return {"image": batch[0], "label": batch[1]}
    raise ValueError(
        f"batch is a {type(batch).__name__}, but must be a dict with `image` and `label` or a pair of them."
    )


def labelled(batch: Any) -> Any:
    """A batch for those who read no labels: where there are none, every image gets the label 0.

    Args:
        batch: what :func:`as_batch` takes, or images alone: a tensor (B, C, H, W), a sequence of that one item, or a
            mapping without labels.

    Example:
        >>> import torch
        >>> labelled(torch.zeros(2, 1, 8, 8))["label"]
        tensor([0, 0])
    """
    if isinstance(batch, Mapping):
        key = next((key for key in ("image", *_ALIASES["image"]) if key in batch), None)
        image = None if key is None else batch[key]
        known = any(batch.get(name) is not None for name in ("label", *_ALIASES["label"]))
        if known or not isinstance(image, Tensor):
            return batch
        return {**batch, "label": torch.zeros(len(image), dtype=torch.int64, device=image.device)}
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 1:
        batch = batch[0]
    return labelled({"image": batch}) if isinstance(batch, Tensor) else batch


def unit_range(image: Any) -> Any:
    """(…) uint8 images as float32 in [0, 1]; anything else as it is."""
    return image.float().div_(255) if isinstance(image, Tensor) and image.dtype is torch.uint8 else image


def model_input(batch: Any) -> dict[str, Any]:
    """Bring a batch of any origin into the form that a network and a loss read.

    What :func:`as_batch` does, then labels of any integer type become int64 and uint8 images float32 in [0, 1]. Images
    that are floating already are left alone, whatever their range and precision; a batch of Lethe's own datamodules
    passes through as it is. Nothing waits for the device, and ``batch`` is not changed.

    Args:
        batch: What :func:`as_batch` reads.

    Returns:
        A dict with at least ``image`` (B, C, H, W) floating and ``label`` (B,) int64.

    Raises:
        ValueError: If images and labels cannot be told apart, or the labels are no whole numbers.

    >>> pixels, classes = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)
    >>> batch = model_input((pixels, classes))
    >>> batch["image"].max().item(), batch["label"].dtype
    (1.0, torch.int64)
    """
    batch = as_batch(batch)
    image, label = unit_range(batch["image"]), batch["label"]
    if not isinstance(label, Tensor):
        try:
            label = torch.as_tensor(label, device=getattr(image, "device", None))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"label is a {type(label).__name__}, but must be a tensor of whole class numbers."
            ) from None
    if label.is_floating_point() or label.is_complex():
        raise ValueError(
            f"label is {label.dtype} {tuple(label.shape)}, but must hold whole class numbers of shape (B,)."
        )
    label = label.long()
    if image is batch["image"] and label is batch["label"]:
        return batch
    return {**batch, "image": image, "label": label}
