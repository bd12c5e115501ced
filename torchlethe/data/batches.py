"""The batch format: a dict with ``image``, ``label`` and ``index``; what padding looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PADDING_LABEL = -100
"""Label of a padding duplicate: the ``ignore_index`` of ``cross_entropy`` and what torchmetrics is told to ignore."""

PADDING_INDEX = -1
"""Index of a padding duplicate: no sample of a training set has it."""

_ALIASES = {"image": ("img", "pixel_values", "images"), "label": ("labels", "target", "fine_label")}


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
