"""What each class lost or gained against the reference: rows of methods, columns of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba

from torchlethe.study.figures import WIDTH, Palette, Plot
from torchlethe.study.results import Results, Run

MOST_CLASSES = 20
SETS = {"test": "Test set", "remain": "Remaining training set"}
LOSS, GAIN = 3, 2  # of the palette's marks: orange and blue, which all eyes tell apart
FAINTEST = 5.0  # points: below this the strongest colour would show noise


def class_panels(results: Results, scenario: str) -> list[Plot]:
    """The change of accuracy against the reference for each class, on the test set and on the remaining samples.

    Args:
        results: the results; runs without the accuracies of classes, such as those of an older version, are left out.
        scenario: its name.

    Returns:
        A panel for each set that was recorded. Of more than 20 classes those that some method changed most.
    """
    return [panel for name, title in SETS.items() if (panel := _panel(results, scenario, name, title))]


def class_changes(results: Results, scenario: str, method: str, samples: str) -> np.ndarray | None:
    """Accuracy minus the reference's of the same seed for each class, mean over seeds.

    Args:
        results: the results.
        scenario: its name.
        method: title of the row.
        samples: ``test`` or ``remain``.

    Returns:
        (K,) points, NaN for a class without samples; None where nothing was recorded.
    """
    reference = {run.seed: run for run in results.select(scenario, results.reference or "")}
    changes = []
    for run in results.select(scenario, method):
        own = _accuracies(run.classes.get("accuracy"), samples)
        other = reference.get(run.seed)
        theirs = _accuracies(other.classes.get("accuracy") if other else None, samples)
        if theirs is None:
            theirs = _accuracies(run.classes.get("reference"), samples)
        if own is not None and theirs is not None and own.shape == theirs.shape:
            changes.append(own - theirs)
    if not changes or len({len(change) for change in changes}) > 1:
        return None
    stacked = np.stack(changes)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _panel(results: Results, scenario: str, samples: str, title: str) -> Plot | None:
    rows = {
        method: changes
        for method in results.methods
        if method != results.reference
        if (changes := class_changes(results, scenario, method, samples)) is not None
    }
    if not rows or len({len(changes) for changes in rows.values()}) > 1:
        return None
    values = np.stack(list(rows.values()))
    run = next(run for run in results.runs if run.scenario == scenario and run.method in rows)
    names, gone = _class_names(run, values.shape[1]), _forgotten(run, values.shape[1])
    strength = np.nanmax(np.abs(np.where(np.isnan(values), 0.0, values)), axis=0)
    shown = np.flatnonzero(~np.isnan(values).all(axis=0))
    if not len(shown):
        return None
    every = len(shown)
    if every > MOST_CLASSES:
        kept = np.lexsort((shown, -np.where(gone[shown], -1.0, strength[shown])))[:MOST_CLASSES]
        shown = np.sort(shown[kept])
    scale = max(FAINTEST, float(strength[shown[~gone[shown]]].max(initial=0.0)))
    labels = [f"({names[k]})" if gone[k] else names[k] for k in shown]
    if every > MOST_CLASSES:
        title += f": {len(shown)} of {every} classes"
    return heat_map(list(rows), labels, values[:, shown], scale, title)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, scale: float, title: str) -> Plot:
    """A table of coloured cells: losses orange, gains blue, the stronger the larger.

    Args:
        rows: labels from top to bottom.
        columns: labels from left to right.
        values: (rows, columns) points; NaN cells stay empty.
        scale: the size that has the full colour.
        title: what it shows.
    """
    labels = [row if len(row) <= 20 else f"{row[:19]}…" for row in rows]
    left = min(10 + 6.6 * max(len(label) for label in labels), 140)
    cell = (WIDTH - left - 4) / max(len(columns), 1)
    upright = max((len(column) for column in columns), default=0) * 6.0 <= cell
    foot = 40.0 if upright else 26 + 5.6 * max(len(column[:14]) for column in columns)

    def draw(axes: Axes, palette: Palette) -> None:
        places = [(x, y) for y in range(len(rows)) for x in range(len(columns))]
        squares = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y in places]
        # one collection for all cells: an artist for each would take seconds
        axes.add_collection(PolyCollection(squares, facecolors=to_rgba(palette.rule, 0.25), linewidths=0))
        sizes = np.minimum(np.abs(np.nan_to_num(values.ravel())) / scale, 1.0)
        colors = [palette.marks[LOSS if value < 0 else GAIN] for value in values.ravel()]
        fills = [to_rgba(color, 0.85 * size) for color, size in zip(colors, sizes, strict=True)]
        axes.add_collection(PolyCollection(squares, facecolors=fills, edgecolors=palette.paper, linewidths=1))
        for x, y in places if cell >= 15 else ():
            value = values[y, x]
            if abs(value) >= 0.5:  # never for NaN
                text = f"{value:.0f}".replace("-", "−")
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=palette.ink)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=11, color=palette.ink)
        axes.set_xticks(
            np.arange(len(columns)) + 0.5,
            [column if len(column) <= 14 else f"{column[:13]}…" for column in columns],
            rotation=0 if upright else 90,
            fontsize=10,
        )
        axes.set_xlabel(f"full colour: {scale:.0f} points", fontsize=10, color=palette.soft, labelpad=3)

    return Plot(title, 22 * len(rows) + foot + 4, (left, foot, 4, 4), draw)


def _accuracies(lists: Any, samples: str) -> np.ndarray | None:
    values = lists.get(samples) if isinstance(lists, Mapping) else None
    if not values:
        return None
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _class_names(run: Run, count: int) -> list[str]:
    names = run.classes.get("names")
    return [str(name) for name in names] if names and len(names) == count else [str(k) for k in range(count)]


def _forgotten(run: Run, count: int) -> np.ndarray:
    """Which classes have no remaining sample."""
    counts = run.classes.get("counts", {}).get("remain")
    return np.array(counts) == 0 if counts and len(counts) == count else np.zeros(count, dtype=bool)
