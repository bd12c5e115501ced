"""Plots as inline SVG that take their colours and fonts from the page, so that they follow light, dark and print.

Each figure is small and made for the width of a phone; the page lays them out side by side where there is room. Colours
are marks that :func:`_svg` replaces by CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 330  # points, shown as as many CSS pixels
VARIABLES = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--rule)", "#040404": "var(--paper)"}
INK, SOFT, RULE, PAPER = VARIABLES
MARKS = tuple(f"#0500{index:02x}" for index in range(16))


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: the method.
        value: the mean.
        std: the spread, or None for a single seed.
        text: what to write at its end.
        mark: index of the method's colour, see ``--m0`` … in the template.
    """

    label: str
    value: float
    std: float | None
    text: str
    mark: int


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element without fixed size, colours and fonts."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', _open(title), text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]+", r"font-size: \2", text)
    for mark, variable in VARIABLES.items():
        text = text.replace(mark, variable)
    for index, mark in enumerate(MARKS):
        text = text.replace(mark, f"var(--m{index})")
    return text


def _open(title: str) -> str:
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\\", "\\\\")
    return rf'<svg viewBox="\1" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'


def _axes(height: float, left: float, bottom: float, right: float = 10, top: float = 6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    width, tall = WIDTH - left - right, height - bottom - top
    axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, tall / height))
    axes.patch.set_visible(False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=11, colors=SOFT)
    return figure, axes


def bars(rows: Sequence[Bar], title: str, limit: float | None = None, reference: Bar | None = None) -> str:
    """Horizontal bars with their values at the end, and a line at the reference's value.

    Args:
        rows: from top to bottom.
        title: for screen readers; the page shows it as text.
        limit: the end of the axis, such as 100 for percent; the largest value by default.
        reference: the bar that the line marks.

    Returns:
        An ``<svg>`` element.
    """
    step = 25
    left = 10 + 6.6 * max((len(row.label) for row in rows), default=0)
    figure, axes = _axes(height=step * len(rows) + 8, left=min(left, 150), bottom=4, right=96, top=4)
    end = limit or max((row.value + (row.std or 0) for row in rows), default=1) or 1
    for position, row in enumerate(rows):
        axes.barh(position, end, height=0.6, color=RULE, alpha=0.5, linewidth=0)
        axes.barh(position, row.value, height=0.6, color=MARKS[row.mark], linewidth=0)
        if row.std:
            for color, width in ((PAPER, 3.5), (INK, 1.3)):
                ends = [max(row.value - row.std, 0), min(row.value + row.std, end)]
                axes.plot(ends, [position] * 2, color=color, linewidth=width, solid_capstyle="butt")
        axes.text(
            end * 1.03, position, row.text, va="center_baseline", ha="left", fontsize=12, color=INK, clip_on=False
        )
    if reference is not None:
        axes.plot([reference.value] * 2, [-0.5, len(rows) - 0.5], color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for label in axes.get_yticklabels():
        label.set(color=INK, fontsize=12, va="center_baseline")
    axes.set_xlim(0, end)
    axes.set_xticks([])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    return _svg(figure, title)


def histogram(after: np.ndarray, before: np.ndarray, reference: np.ndarray, mark: int, title: str) -> str:
    """How sure the model is of the true label: the method filled, the original dashed, the reference as a line.

    Args:
        after: ``(N,)`` confidences in [0, 1] of the method.
        before: those of the original model, or empty.
        reference: those of the reference, or empty.
        mark: index of the method's colour.
        title: for screen readers.

    Returns:
        An ``<svg>`` element; the vertical axis is the share of samples.
    """
    edges = np.linspace(0, 1, 21)
    figure, axes = _axes(height=160, left=40, bottom=36, right=8, top=10)

    def share(values: np.ndarray) -> np.ndarray:
        return np.histogram(values, edges)[0] * 100 / max(len(values), 1)

    axes.stairs(share(after), edges, fill=True, color=MARKS[mark], alpha=0.75, linewidth=0)
    if len(before):
        axes.stairs(share(before), edges, color=SOFT, linewidth=1.3, linestyle=(0, (3, 2)))
    if len(reference):
        axes.stairs(share(reference), edges, color=INK, linewidth=1.4)
    top = max([1.0, *(share(values).max() for values in (after, before, reference) if len(values))])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, top * 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks(ticks := _ticks(top), [f"{tick:g} %" if tick == ticks[-1] else f"{tick:g}" for tick in ticks])
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_xlabel("confidence in the label", fontsize=11, color=SOFT, labelpad=3)
    return _svg(figure, title)


def _ticks(top: float) -> list[float]:
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50) if top / s <= 4), 50)
    return [0.0, *(float(tick) for tick in range(step, int(top) + 1, step))]
