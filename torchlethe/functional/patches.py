"""Linearly separable patches: blocks of one value, whose values a linear classifier tells apart.

Source: Yu et al., KDD 2022, dayu11/Availability-Attacks-Create-Shortcuts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(values: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Turn values into images of square blocks.

    Args:
        values: (B, C, h, w), one value for each block.
        size: height and width of the images; the last blocks are cut where they do not fit.
        patch: side of a block in pixels.

    Returns:
        (B, C, H, W).

    >>> blocks(torch.tensor([[[[1.0, 2.0]]]]), (1, 4), 2)
    tensor([[[[1., 1., 2., 2.]]]])
    """
    large = values.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return large[..., : size[0], : size[1]]


def with_norm(delta: Tensor, norm: float) -> Tensor:
    """Scale each image's perturbation (B, C, H, W) to a Euclidean norm; one that is 0 stays."""
    length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return delta * (norm / length.clamp_min(torch.finfo(delta.dtype).tiny))[:, None, None, None]
