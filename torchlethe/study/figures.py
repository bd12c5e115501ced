"""Plots for the page and for papers, from the same drawings.

On the page a plot is an inline SVG that takes its colours and fonts from there, so that it follows light, dark and
print: colours are marks that :func:`inline` replaces by CSS variables. For a paper :func:`save` puts several plots on
one sheet, as PNG and PDF. Each plot is small and made for the width of a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchlethe.files import atomic_write

WIDTH = 330  # points, shown as as many CSS pixels
MARKS = 16


@dataclass(frozen=True)
class Palette:
    """Colours by role; ``marks`` are the methods' own, see ``--m0`` … in the template."""

    ink: str
    soft: str
    rule: str
    paper: str
    marks: tuple[str, ...]


PAGE = Palette("#010101", "#020202", "#030303", "#040404", tuple(f"#0500{index:02x}" for index in range(MARKS)))
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PRINT = Palette(
    "#16191d",
    "#5c636b",
    "#dfe2e6",
    "#ffffff",
    ("#a3a9b0", "#40464d", *_CYCLE, "#7a5195", "#8c6d31", *_CYCLE),
)


@dataclass(frozen=True)
class Plot:
    """A drawing that has no figure yet.

    Attributes:
        title: what it shows; the page has it as text, a sheet above the axes.
        height: of the whole plot in points; the width is :data:`WIDTH`.
        margins: left, bottom, right and top in points.
        draw: fills the axes.
        mark: index of the method's colour, where the plot is about one method.
    """

    title: str
    height: float
    margins: tuple[float, float, float, float]
    draw: Callable[[Axes, Palette], None]
    mark: int = 0


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: the method.
        value: the mean.
        std: the spread, or None for a single seed.
        text: what to write at its end.
        mark: index of the method's colour.
    """

    label: str
    value: float
    std: float | None
    text: str
    mark: int


def inline(plot: Plot, label: str = "") -> str:
    """The plot as an ``<svg>`` element without fixed size, colours and fonts.

    Args:
        plot: the plot.
        label: what a screen reader says; the title by default.
    """
    import matplotlib as mpl

    figure = Figure(figsize=(WIDTH / 72, plot.height / 72))
    plot.draw(_axes(figure, plot, PAGE, 0, 0), PAGE)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label or plot.title}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', _open(label or plot.title), text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]+", r"font-size: \2", text)
    for name in ("ink", "soft", "rule", "paper"):
        text = text.replace(getattr(PAGE, name), f"var(--{name})")
    for index, mark in enumerate(PAGE.marks):
        text = text.replace(mark, f"var(--m{index})")
    return text


def _open(title: str) -> str:
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\\", "\\\\")
    return rf'<svg viewBox="\1" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'


def save(plots: Sequence[Plot], path: Path, note: str = "", columns: int = 3) -> list[Path]:
    """Write plots side by side on one white sheet, as PNG (200 dpi) and PDF with real text.

    Args:
        plots: at least one.
        path: the files without suffix.
        note: a line below the plots.
        columns: plots in a row.

    Returns:
        The files written.
    """
    import matplotlib as mpl

    columns = min(columns, len(plots))
    rows = [plots[start : start + columns] for start in range(0, len(plots), columns)]
    head, gap, foot = 24, 26, 22 if note else 4
    heights = [max(plot.height for plot in row) + head for row in rows]
    width = columns * WIDTH + (columns - 1) * gap
    height = sum(heights) + (len(rows) - 1) * gap / 2 + foot
    figure = Figure(figsize=(width / 72, height / 72), facecolor=PRINT.paper)
    top = height
    for row, tall in zip(rows, heights, strict=True):
        for column, plot in enumerate(row):
            x = column * (WIDTH + gap)
            figure.text(x / width, (top - 14) / height, plot.title, fontsize=12, weight="bold")
            plot.draw(_axes(figure, plot, PRINT, x, top - head - plot.height), PRINT)
        top -= tall + gap / 2
    if note:
        figure.text(0, 6 / height, note, fontsize=10, color=PRINT.soft)
    written = []
    with mpl.rc_context({"pdf.fonttype": 42}):
        for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"metadata": {"CreationDate": None}})):
            file = path.with_name(path.name + suffix)
            with atomic_write(file) as temporary:
                figure.savefig(temporary, format=suffix[1:], **options)
            written.append(file)
    return written


def _axes(figure: Figure, plot: Plot, palette: Palette, x: float, y: float) -> Axes:
    left, bottom, right, top = plot.margins
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (
            (x + left) / width,
            (y + bottom) / height,
            (WIDTH - left - right) / width,
            (plot.height - bottom - top) / height,
        )
    )
    axes.patch.set_visible(False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=11, colors=palette.soft)
    return axes


def bar_plot(rows: Sequence[Bar], title: str, limit: float | None = None, reference: Bar | None = None) -> Plot:
    """Horizontal bars with their values at the end, and a line at the reference's value.

    Args:
        rows: from top to bottom.
        title: what it shows.
        limit: the end of the axis, such as 100 for percent; the largest value by default.
        reference: the bar that the line marks.
    """
    labels = [_in_two_lines(row.label) for row in rows]
    longest = max(
        (len(line) * (5.2 if "\n" in label else 6.6) for label in labels for line in label.split("\n")), default=0
    )
    left = min(10 + longest, 160)
    right = max(60, 14 + 6.6 * max((len(row.text) for row in rows), default=0))
    ends = [row.value + sign * (row.std or 0) for row in rows for sign in (-1, 1)]
    end = limit or max([*ends, 0.0]) or 1.0
    # a spread that reaches below zero is no reason for an axis that does
    start = min([*(row.value for row in rows), 0.0])

    def draw(axes: Axes, palette: Palette) -> None:
        for position, row in enumerate(rows):
            axes.barh(position, end - start, left=start, height=0.6, color=palette.rule, alpha=0.5, linewidth=0)
            axes.barh(position, row.value, height=0.6, color=palette.marks[row.mark], linewidth=0)
            if row.std:
                between = [max(row.value - row.std, start), min(row.value + row.std, end)]
                for color, width in ((palette.paper, 3.5), (palette.ink, 1.3)):
                    axes.plot(between, [position] * 2, color=color, linewidth=width, solid_capstyle="butt")
            place = end + (end - start) * 0.03
            axes.text(place, position, row.text, va="center_baseline", fontsize=12, color=palette.ink, clip_on=False)
        if reference is not None:
            span = [-0.5, len(rows) - 0.5]
            axes.plot([reference.value] * 2, span, color=palette.ink, linewidth=1, linestyle=(0, (2, 2)))
        for position, label in enumerate(labels):
            lines = label.split("\n")  # one text each, as a browser's font is narrower than the one measured here
            for line, raised in zip(lines, (0.0,) if len(lines) == 1 else (5.0, -5.5), strict=True):
                axes.annotate(
                    line,
                    (0, position),
                    (-5, raised),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    va="center_baseline",
                    fontsize=12 if len(lines) == 1 else 9,
                    color=palette.ink,
                )
        axes.set_yticks([])
        axes.set_xlim(start, end)
        axes.set_xticks([])
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)

    return Plot(title, 25 * len(rows) + 8, (left, 4, right, 4), draw)


def _in_two_lines(label: str) -> str:
    """A long name, such as one with its point of a grid, on two lines; what is longer still is cut off."""
    if len(label) <= 20:
        return label
    name, _, point = label.partition(" (")
    lines = [name, f"({point}"] if point else [label]
    return "\n".join(line if len(line) <= 30 else f"{line[:29]}…" for line in lines)


def histogram(after: np.ndarray, before: np.ndarray, reference: np.ndarray, mark: int, title: str) -> Plot:
    """How sure the model is of the true label: the method filled, the original dashed, the reference as a line.

    Args:
        after: ``(N,)`` confidences in [0, 1] of the method.
        before: those of the original model, or empty.
        reference: those of the reference, or empty.
        mark: index of the method's colour.
        title: what it shows. The vertical axis is the share of samples.
    """
    edges = np.linspace(0, 1, 21)

    def share(values: np.ndarray) -> np.ndarray:
        return np.histogram(values, edges)[0] * 100 / max(len(values), 1)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.stairs(share(after), edges, fill=True, color=palette.marks[mark], alpha=0.75, linewidth=0)
        if len(before):
            axes.stairs(share(before), edges, color=palette.soft, linewidth=1.3, linestyle=(0, (3, 2)))
        if len(reference):
            axes.stairs(share(reference), edges, color=palette.ink, linewidth=1.4)
        top = max([1.0, *(share(values).max() for values in (after, before, reference) if len(values))])
        axes.set_xlim(0, 1)
        axes.set_ylim(0, top * 1.04)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ticks = _ticks(top)
        axes.set_yticks(ticks, [f"{tick:g} %" if tick == ticks[-1] else f"{tick:g}" for tick in ticks])
        axes.grid(axis="y", color=palette.rule, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.axhline(0, color=palette.soft, linewidth=1)
        axes.set_xlabel("confidence in the label", fontsize=11, color=palette.soft, labelpad=3)

    return Plot(title, 160, (40, 36, 8, 10), draw, mark)


def _ticks(top: float) -> list[float]:
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50) if top / s <= 4), 50)
    return [0.0, *(float(tick) for tick in range(step, int(top) + 1, step))]


def decades(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that a logarithmic axis is due."""
    return min(values, default=0) > 0 and math.log10(max(values) / min(values)) > 1.5
