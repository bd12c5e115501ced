"""The maths of NatMU's mixtures: masks, blending, the learning-rate schedule.

Source: He, Li, Cheng, Huang and Huang, "Towards Natural Machine Unlearning", TPAMI 2025,
https://arxiv.org/abs/2405.15495; official code https://github.com/ZhengbaoHe/NatMU. Which remaining image a forget
image is mixed with is in :mod:`torchlethe.functional.pairing`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MaskKind = Literal["tent", "linear", "constant", "cutmix"]
MASKS = 4
"""Number of different masks; further hybrids of the same image use them again."""


def hybrid_masks(delta: float, height: int, width: int | None = None, kind: MaskKind = "tent") -> Tensor:
    r"""The four masks :math:`m_0 … m_3`: the weight of the **forget** image in each pixel of a hybrid.

    The published masks are tents :math:`t(p)`, 0 at both borders and :math:`(b-1)/b` on the centre lines
    (:math:`b` half the side): :math:`M_0 = t(\text{row})`, :math:`M_1 = t(\text{column})`, and their complements
    :math:`M_2, M_3 = (b-1)/b - M_0, M_1`, in which the borders belong to the forget image; then
    :math:`m_k = \mathrm{clip}(M_k + \delta, 0, 1)`, so that a larger delta leaves more of the forget image and forgets
    more strongly.

    Args:
        delta: :math:`\delta`; at 0 a mask has the mean :math:`(b-1)/2b`, from 1 on it is 1 everywhere, below
            :math:`-(b-1)/b` it is 0.
        height: rows of an image, at least 2.
        width: columns; as many as rows by default.
        kind: ``tent``, as published. Others for comparison: ``linear`` ramps from one border to the other, ``constant``
            is 1/2 + delta everywhere (a plain mixture), ``cutmix`` takes each pixel from one of the images, where the
            tent exceeds half of its height (delta shifts the border).

    Returns:
        Masks, shape ``(4, height, width)``, float32, in [0, 1].

    Raises:
        ValueError: a side is below 2, or the kind is unknown.

    Example:
        >>> hybrid_masks(0.0, 4)[0, :, 0]
        tensor([0.0000, 0.5000, 0.5000, 0.0000])
    """
    width = height if width is None else width
    if min(height, width) < 2:
        raise ValueError(f"the image is {height}×{width}, a mask needs at least 2×2 pixels.")
    shift = torch.tensor(delta, dtype=torch.float32)
    if kind == "constant":
        return (torch.full((MASKS, height, width), 0.5) + shift).clamp_(0, 1)
    if kind == "linear":
        profiles = [torch.linspace(0, 1, size, dtype=torch.float64) for size in (height, width)]
        tops = [1.0, 1.0]
    elif kind in ("tent", "cutmix"):
        profiles = [_tent(size) for size in (height, width)]
        tops = [float(profile.max()) for profile in profiles]
    else:
        raise ValueError(f"mask is '{kind}', allowed are tent, linear, constant and cutmix.")
    rows, columns = profiles[0][:, None].expand(height, width), profiles[1].expand(height, width)
    masks = torch.stack([rows, columns, tops[0] - rows, tops[1] - columns]).float() + shift
    if kind == "cutmix":
        half = torch.tensor([tops[0], tops[1], tops[0], tops[1]])[:, None, None] / 2
        return (masks > half).float()
    return masks.clamp_(0, 1)


def _tent(size: int) -> Tensor:
    """Weights 0 … (b-1)/b … 0 along one side, in the official order of operations (float64)."""
    half = size // 2
    top = 1.0 if size % 2 else (half - 1) / half
    place = torch.arange(size, dtype=torch.float64)
    return torch.where(place < half, place / half, top - (place - half) / half)


def blend(remain: Tensor, forget: Tensor, weight: Tensor) -> Tensor:
    r"""Hybrids :math:`x_r (1 - m) + x_f m`; uint8 images are blended in float32, clipped and truncated, as published.

    Args:
        remain: remaining images :math:`x_r`, shape ``(B, C, H, W)``, uint8 or floating.
        forget: forget images :math:`x_f`, same shape and dtype.
        weight: masks :math:`m` in [0, 1], one for each pair, shape ``(B, H, W)``.

    Returns:
        Hybrids, shape and dtype of ``remain``. Truncation may cost a constant region one grey level; floating images
        (of whatever normalisation) are blended without clipping.

    Example:
        >>> black, white = torch.zeros(1, 1, 1, 2).byte(), torch.full((1, 1, 1, 2), 255).byte()
        >>> blend(black, white, torch.tensor([[[0.25, 1.0]]])).flatten()
        tensor([ 63, 255], dtype=torch.uint8)
    """
    weight = weight[:, None]
    if remain.dtype is torch.uint8:
        return (remain.float() * (1 - weight) + forget.float() * weight).clamp_(0, 255).to(torch.uint8)
    weight = weight.to(remain.dtype)
    return remain * (1 - weight) + forget * weight


def cosine_factor(step: int, steps: int, end_at_zero: bool = True) -> float:
    """Factor on the learning rate at an optimizer step: half a cosine over the run.

    Args:
        step: number of the step, from 0.
        steps: steps of the run.
        end_at_zero: as published: the first step is below the full rate already and the last one has rate exactly 0.
            False shifts the curve by one step, so that the first is full and the last one still moves.

    Returns:
        The factor, in [0, 1]; 0 after the end.

    Example:
        >>> [round(cosine_factor(step, 2), 3) for step in range(2)], cosine_factor(0, 2, end_at_zero=False)
        ([0.5, 0.0], 1.0)
    """
    done = min(step + end_at_zero, steps) / steps
    return math.cos(math.pi * done) / 2 + 0.5
