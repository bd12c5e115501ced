"""Curves over epochs: how a number that a run recorded again and again went, one line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from torchlethe.study.figures import WIDTH, Palette, Plot


@dataclass(frozen=True)
class Line:
    """One method.

    Attributes:
        label: its name.
        values: of epoch 1, 2, …; NaN where none was recorded.
        mark: index of the method's colour.
    """

    label: str
    values: np.ndarray
    mark: int


def mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over seeds, epoch by epoch, as far as all of them go.

    Example:
        >>> mean_curve([np.array([1.0, np.nan, 3.0]), np.array([3.0, np.nan])])
        array([ 2., nan])
    """
    length = min(len(curve) for curve in curves)
    return np.mean([curve[:length] for curve in curves], axis=0)


def curve_plot(lines: Sequence[Line], title: str) -> Plot:
    """Lines over epochs, each with its name at its end.

    Args:
        lines: the methods; those that have no two values are left out.
        title: what it shows.
    """
    shown = [line for line in lines if np.isfinite(line.values).sum() > 1]
    margins = (34, 36, 14 + 5.6 * max((len(line.label) for line in shown), default=0), 10)
    height = 210

    def draw(axes: Axes, palette: Palette) -> None:
        ends = []
        for line in shown:
            known = np.isfinite(line.values)
            x, y = np.arange(1, len(line.values) + 1)[known], line.values[known]
            axes.plot(x, y, color=palette.marks[line.mark], linewidth=1.7, solid_joinstyle="round")
            ends.append((float(y[-1]), float(x[-1]), line))
        axes.margins(0.02, 0.08)
        axes.autoscale_view()
        low, high = axes.get_ylim()
        step = 13 * (high - low) / (height - margins[1] - margins[3])  # the height of a name, in units of the axis
        ends.sort(key=lambda end: end[:2])
        places = [value for value, _, _ in ends]
        for i in range(1, len(places)):  # upwards, until no two names touch
            places[i] = max(places[i], places[i - 1] + step)
        limit = high
        for i in reversed(range(len(places))):  # and back down where they left through the top
            places[i] = min(places[i], limit)
            limit = places[i] - step
        for place, (_, _, line) in zip(places, ends, strict=True):
            axes.annotate(
                line.label,
                (1, place),
                (6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=palette.marks[line.mark],
                annotation_clip=False,
            )
        axes.set_ylim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(color=palette.rule, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("epoch", fontsize=11, color=palette.soft, labelpad=3)

    return Plot(title, height, (margins[0], margins[1], min(margins[2], WIDTH * 0.45), margins[3]), draw)
