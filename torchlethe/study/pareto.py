"""The trade-off plot: two metrics against each other, and the methods that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from torchlethe.study.figures import WIDTH, Palette, Plot, decades

Direction = Literal["lower", "higher"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows and which direction is good."""

    title: str
    better: Direction

    @property
    def label(self) -> str:
        """The title with the good direction."""
        return f"{self.title} ({self.better} is better)"


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        label: its name.
        x: mean on the horizontal axis.
        y: mean on the vertical axis.
        x_std: spread over seeds, or None.
        y_std: the same for the vertical axis.
        mark: index of the method's colour.
        competes: False for the reference and the original of an unlearning study.
    """

    label: str
    x: float
    y: float
    x_std: float | None
    y_std: float | None
    mark: int
    competes: bool = True


def front(points: Sequence[Point], x: Direction, y: Direction) -> list[Point]:
    """The competing points that no other one beats on one axis without losing on the other, from left to right.

    Example:
        >>> a, b, c = (Point(n, *xy, None, None, 0) for n, xy in (("a", (1, 3)), ("b", (2, 2)), ("c", (3, 3))))
        >>> [point.label for point in front([c, b, a], "lower", "lower")]
        ['a', 'b']
    """
    signs = (1 if x == "lower" else -1, 1 if y == "lower" else -1)

    def costs(point: Point) -> tuple[float, float]:
        return signs[0] * point.x, signs[1] * point.y

    def beaten(point: Point) -> bool:
        own = costs(point)
        others = [costs(other) for other in points if other.competes]
        return any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in others)

    kept = [point for point in points if point.competes and not beaten(point)]
    return sorted(kept, key=lambda point: (point.x, point.y))


def pareto_plot(points: Sequence[Point], title: str, x: Axis, y: Axis) -> Plot:
    """Two metrics against each other, with the spread over seeds and a line through the front.

    Args:
        points: the methods; those that do not compete are drawn hollow.
        title: what it shows.
        x: the horizontal axis.
        y: the vertical axis.
    """
    margins = (46, 38, 14, 12)
    height = 230
    best = front(points, x.better, y.better)

    def draw(axes: Axes, palette: Palette) -> None:
        if decades([p.x for p in points]):
            axes.set_xscale("log")
        if decades([p.y for p in points]):
            axes.set_yscale("log")
        if len(best) > 1:
            line: dict[str, Any] = {"color": palette.soft, "linewidth": 1, "linestyle": (0, (3, 2)), "zorder": 1}
            axes.plot([p.x for p in best], [p.y for p in best], **line)
        for point in points:
            color = palette.marks[point.mark]
            spread: dict[str, Any] = {"fmt": "none", "ecolor": color, "elinewidth": 1.2, "alpha": 0.55, "zorder": 2}
            axes.errorbar(point.x, point.y, xerr=_error(axes.get_xscale(), point.x, point.x_std), **spread)
            axes.errorbar(point.x, point.y, yerr=_error(axes.get_yscale(), point.y, point.y_std), **spread)
            face = color if point.competes else palette.paper
            axes.plot(point.x, point.y, "o", markersize=7.5, color=face, markeredgecolor=color, markeredgewidth=1.8)
        axes.margins(0.12)
        axes.autoscale_view()
        for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
            axis.set_major_locator(LogLocator(numticks=5, subs=(1, 3)) if scale == "log" else MaxNLocator(4))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("-", "−"))
        axes.grid(color=palette.rule, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(x.label, fontsize=11, color=palette.soft, labelpad=3)
        axes.text(
            -margins[0] / (WIDTH - margins[0] - margins[2]), 1.06, y.label, transform=axes.transAxes, fontsize=11,
            color=palette.soft, va="bottom",
        )  # fmt: skip
        named = points if len(points) <= 10 else [p for p in points if p in best or not p.competes]
        _label(axes, points, named, palette, (WIDTH - margins[0] - margins[2], height - margins[1] - margins[3] - 14))

    return Plot(title, height, (margins[0], margins[1], margins[2], margins[3] + 14), draw)


def _error(scale: str, value: float, std: float | None) -> list[list[float]] | None:
    if not std:
        return None
    return [[min(std, value * 0.9) if scale == "log" else std], [std]]


def _label(
    axes: Axes, points: Sequence[Point], named: Sequence[Point], palette: Palette, size: tuple[float, float]
) -> None:
    """Write names beside points where they hide neither points nor other names, nor spreads if that can be."""
    width, height = size
    to_unit = (axes.transData + axes.transAxes.inverted()).transform

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = to_unit((x, y))
        return float(u) * width, float(v) * height

    dots, spreads = list[Box](), list[Box]()
    for point in points:
        x, y = place(point.x, point.y)
        dots.append((x - 5, y - 5, x + 5, y + 5))
        right, top = place(point.x + (point.x_std or 0), point.y + (point.y_std or 0))
        spreads += [(2 * x - right, y - 1, right, y + 1), (x - 1, 2 * y - top, x + 1, top)]
    for point in named:
        x, y = place(point.x, point.y)
        long = 6.3 * len(point.label) + 2
        corners = [(x + 8, y - 6), (x - 8 - long, y - 6), (x - long / 2, y + 8), (x - long / 2, y - 20)]
        corners += [(x + 6, y + 5), (x - 6 - long, y + 5), (x + 6, y - 18), (x - 6 - long, y - 18)]
        # further away, and pushed back inside
        corners += [(min(max(left, 1), width + 11 - long), y + up) for up in (20, -32, 33) for left, _ in corners[:3]]
        boxes = [(left, bottom, left + long, bottom + 12) for left, bottom in corners]
        inside = [box for box in boxes if box[0] > 0 and box[2] < width + 12 and box[1] > 0 and box[3] < height + 6]
        for taken in ([*dots, *spreads], dots):
            free = next((box for box in inside if not any(_overlap(box, other) for other in taken)), None)
            if free is not None:
                dots.append(free)
                style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 11.5, "color": palette.ink}
                axes.text(free[0] / width, (free[1] + 2.5) / height, point.label, **style)
                break


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
