"""Pictures of a protection: clean images, magnified perturbations, protected images; accuracy over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

INK, SOFT, RULE = "#1f2430", "#6b7280", "#d1d5db"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def magnified(clean: Tensor, protected: Tensor) -> tuple[Tensor, float]:
    """Perturbations that the eye can see: k · (protected − clean) around mid-grey.

    Args:
        clean: (N, C, H, W) uint8.
        protected: (N, C, H, W) uint8.

    Returns:
        (N, C, H, W) float32 in [0, 1], and k, which brings the largest change to black or white (at least 1).

    Example:
        >>> magnified(torch.zeros(1, 1, 1, 2, dtype=torch.uint8), torch.tensor([[[[0, 4]]]], dtype=torch.uint8))
        (tensor([[[[0.5000, 1.0000]]]]), 31.875)
    """
    change = protected.float() - clean.float()
    factor = max(1.0, 127.5 / max(1.0, float(change.abs().max())))
    return (0.5 + factor * change / 255).clamp(0, 1), factor


def draw_protection(clean: Tensor, protected: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """Three rows: clean images, their perturbations magnified, the protected images.

    Args:
        clean: (N, C, H, W) uint8, N ≥ 1.
        protected: (N, C, H, W) uint8.
        names: N words, the classes of the images.
        title: the method.

    Returns:
        A figure; save it with ``savefig``.
    """
    change, factor = magnified(clean, protected)
    rows: list[tuple[str, Tensor]] = [
        ("clean", clean.float() / 255),
        (f"change × {factor:.0f}", change),
        ("protected", protected.float() / 255),
    ]
    side, left, head, foot, gap = 1.0, 1.05, 0.5, 0.3, 0.06  # inches
    width, height = left + len(clean) * (side + gap) + 0.1, head + 3 * (side + gap) + foot
    figure = Figure((width, height), dpi=130, facecolor="white")
    largest = int((protected.int() - clean.int()).abs().max())
    text = f"{title}: no value changes by more than {largest}/255" if title else f"largest change {largest}/255"
    figure.text(0.1 / width, 1 - 0.28 / height, text, color=INK, fontsize=11, fontweight="bold", va="center")
    for number, (label, images) in enumerate(rows):
        bottom = foot + (2 - number) * (side + gap)
        figure.text(0.1 / width, (bottom + side / 2) / height, label, color=SOFT, fontsize=9, va="center")
        for column, image in enumerate(images):
            place = (left + column * (side + gap)) / width, bottom / height, side / width, side / height
            axes: Any = figure.add_axes(place, xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=RULE, linewidth=0.6)
            pixels = image[0] if len(image) != 3 else image.permute(1, 2, 0)
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if number == 2:
                axes.set_xlabel(names[column], fontsize=8, color=SOFT, labelpad=3)
    return figure


def draw_curves(curves: Mapping[str, Sequence[float]], title: str = "Test accuracy over epochs, %") -> Figure:
    """Lines over epochs, in percent.

    Args:
        curves: values of epoch 1, 2, … by name; NaN where an epoch was not evaluated.
        title: above the axes.

    Returns:
        A figure; save it with ``savefig``.
    """
    figure = Figure((5.2, 3.4), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(curves.items()):
        y = np.asarray(values, dtype=float)
        known = np.isfinite(y)
        x = np.arange(1, len(y) + 1)[known]
        axes.plot(x, y[known], color=COLORS[number % len(COLORS)], linewidth=1.6, label=name)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("epoch", fontsize=9, color=SOFT)
    axes.set_ylim(0, 101)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def preview_rows(count: int, wanted: int) -> Tensor:
    """Evenly spread positions: (min(count, wanted),) int64."""
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // max(1, wanted)
