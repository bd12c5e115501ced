"""Which plots a scenario gets: bars, curves, trade-offs and confidence histograms, for the page and for files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from torchlethe.study.curves import Line, curve_plot, mean_curve
from torchlethe.study.figures import MARKS, Bar, Plot, bar_plot, histogram, save
from torchlethe.study.files import read_json, write_json
from torchlethe.study.heatmap import class_panels
from torchlethe.study.pareto import Axis, Point, pareto_plot
from torchlethe.study.results import Cell, Results
from torchlethe.study.tables import spread, table_csv

UNLEARNING_BARS = (
    "forget_accuracy",
    "remain_accuracy",
    "test_accuracy",
    "mia_entropy_logistic",
    "average_gap",
    "run_seconds",
)
MOST_BARS = 9


def method_marks(results: Results) -> dict[str, int]:
    """The colour of each method: 0 for the original, 1 for the reference, then the methods in order."""
    marks = {results.original: 0, results.reference: 1}
    others = [method for method in results.methods if method not in marks]
    # more methods than colours: start over behind the two that are reserved
    return {method: marks.get(method, 0) for method in results.methods} | {
        method: 2 + index % (MARKS - 2) for index, method in enumerate(others)
    }


def plot_title(results: Results, metric: str) -> str:
    """A metric's title with its unit."""
    found = results.definition(metric)
    return f"{found.title}, {found.unit}" if found.unit else found.title


def sentence_case(text: str) -> str:
    """With a capital in front, unless it begins with an identifier or a symbol (``hessian_trace``, λ max)."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]{3,}(?!\w*_)", text) else text


def bar_panels(results: Results, scenario: str) -> list[Plot]:
    """One panel of bars per metric: those that the study chose, or the usual ones."""
    marks = method_marks(results)
    names = list(UNLEARNING_BARS) if results.unlearning and not results.chosen else results.columns(scenario)
    panels = []
    for name in names[:MOST_BARS]:
        unit = results.definition(name).unit
        rows = [
            Bar(method, cell.mean, cell.std, spread(cell, unit), marks[method])
            for method in results.methods
            if (cell := results.cell(scenario, method, name))
        ]
        if not rows:
            continue
        percent = unit == "%" and results.better(name) != "lower"  # differences have no natural end
        compared = any((cell := results.cell(scenario, row.label, name)) and cell.gaps for row in rows)
        line = next((row for row in rows if row.label == results.reference and compared), None)
        panels.append(bar_plot(rows, sentence_case(plot_title(results, name)), 100 if percent else None, line))
    return panels


def histogram_panels(results: Results, scenario: str) -> list[Plot]:
    """The confidences of each method on the forget set."""
    marks = method_marks(results)
    reference = results.confidences(scenario, results.reference or "")
    original = results.confidences(scenario, results.original or "")
    return [
        histogram(values, original, reference, marks[method], method)
        for method in results.methods
        if method not in (results.original, results.reference) and len(values := results.confidences(scenario, method))
    ]


def curve_panels(results: Results, scenario: str) -> list[Plot]:
    """What runs recorded over their epochs (arrays ``…_curve``): a panel for each, a line for each method."""
    marks = method_marks(results)
    found: dict[str, list[Line]] = {}
    for method in results.methods:
        curves: dict[str, list[np.ndarray]] = {}
        for run in results.select(scenario, method):
            for name, values in run.curves().items():
                curves.setdefault(name, []).append(values)
        for name, seeds in curves.items():
            found.setdefault(name, []).append(Line(method, mean_curve(seeds), marks[method]))
    return [
        curve_plot(lines, f"{sentence_case(name.replace('_', ' '))} over epochs")
        for name, lines in found.items()
        if any(np.isfinite(line.values).sum() > 1 for line in lines)
    ]


def pareto_panels(results: Results, scenario: str) -> list[Plot]:
    """What one metric costs in another: distance to the reference, usefulness, time.

    In unlearning the average gap against the run time, and the forget accuracy's gap against the test accuracy of what
    must be kept. Elsewhere, if the table shows the time, the first metric whose good direction is known against it.
    """
    names = results.metrics(scenario)
    clock = next((name for name in ("run_seconds", "stage_seconds") if name in names), None)
    if results.unlearning and results.reference:
        useful = "test_remain_accuracy" if "test_remain_accuracy" in names else "test_accuracy"
        pairs = [(clock, "average_gap"), (useful, "forget_gap")]
    else:
        columns = results.columns(scenario)
        known = [name for name in columns if results.better(name) and name != clock]
        pairs = [(clock, known[0])] if known and clock in columns else []
    found = [_trade_off(results, scenario, x, y) for x, y in pairs if x is not None]
    return [panel for panel in found if panel is not None]


def _trade_off(results: Results, scenario: str, x: str, y: str) -> Plot | None:
    marks = method_marks(results)
    aside = (results.original, results.reference) if results.unlearning else ()
    points = []
    for method in results.methods:
        cells = [_cell(results, scenario, method, name) for name in (x, y)]
        if cells[0] is None or cells[1] is None:
            continue
        points.append(
            Point(method, cells[0].mean, cells[1].mean, cells[0].std, cells[1].std, marks[method], method not in aside)
        )
    if sum(point.competes for point in points) < 2:
        return None
    axes = [_axis(results, name) for name in (x, y)]
    title = f"{axes[1].title.split(',')[0]} against {axes[0].title.split(',')[0]}"
    return pareto_plot(points, sentence_case(title), axes[0], axes[1])


def _cell(results: Results, scenario: str, method: str, name: str) -> Cell | None:
    if method == results.reference and name in ("average_gap", "forget_gap"):
        return Cell((0.0,))
    if name == "forget_gap":
        cell = results.cell(scenario, method, "forget_accuracy")
        return Cell(tuple(abs(gap) for gap in cell.gaps)) if cell and cell.gaps else None
    return results.cell(scenario, method, name)


def _axis(results: Results, name: str) -> Axis:
    if name == "forget_gap":
        return Axis("gap of forget accuracy, %", "lower")
    better = results.better(name)
    return Axis(plot_title(results, name), "lower" if better == "lower" else "higher")


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write every scenario's plots to files: bars, curves, trade-offs, confidences and classes, as PNG and PDF.

    Args:
        results: the results.
        folder: made when there is something to write. Files that show the same results already are left as they are.

    Returns:
        The files: ``bars``, ``curves``, ``pareto``, ``confidence`` and ``classes`` with the two suffixes, behind the
        scenario's name where there are several.
    """
    stamp, current = folder / ".made_of.json", _fingerprint(results)
    before = read_json(stamp)
    if before.get("fingerprint") == current and all((folder / name).is_file() for name in before["files"]):
        return [folder / name for name in before["files"]]
    written = [path for scenario in results.scenarios for path in _write_scenario(results, scenario, folder)]
    if written:
        write_json(stamp, {"fingerprint": current, "files": [path.name for path in written]})
    return written


def _fingerprint(results: Results) -> str:
    """What the figures depend on: every number, the recorded confidences and the code that draws."""
    arrays = [run.arrays.stat() for run in results.runs if run.arrays.is_file()]
    code = [
        Path(__file__).with_name(name).read_text("utf-8")
        for name in ("figures.py", "heatmap.py", "pareto.py", "curves.py", "panels.py")
    ]
    classes = repr([run.classes for run in results.runs])
    marks = [
        *code,
        table_csv(results),
        repr(results.chosen),
        classes,
        *(f"{s.st_size} {s.st_mtime_ns}" for s in arrays),
    ]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def _write_scenario(results: Results, scenario: str, folder: Path) -> list[Path]:
    reference, original = results.reference, results.original
    prefix = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', scenario)}_" if len(results.titles) > 1 else ""
    dashed = f"Dashed: {reference}. " if reference else ""
    spread_note = "Thin line: ± one standard deviation over seeds." if len(results.seeds) > 1 else ""
    lines = [f"dashed: {original}, before" if original else "", f"line: {reference}" if reference else ""]
    filled = "; ".join(text for text in (*lines, "filled: the method, after") if text)
    front = "Dashed: the methods that no other one beats on both axes."
    change = f"Points of accuracy against {reference}: orange lost, blue gained; in parentheses: to be forgotten."
    averaged = "Mean over seeds." if len(results.seeds) > 1 else ""
    kinds = {
        "curves": (curve_panels(results, scenario), averaged, 2),
        "bars": (bar_panels(results, scenario), dashed + spread_note, 3),
        "pareto": (pareto_panels(results, scenario), front, 2),
        "confidence": (histogram_panels(results, scenario), f"Share of the forget set; {filled}.", 3),
        "classes": (class_panels(results, scenario), change, 2),
    }
    written = []
    for kind, (plots, note, columns) in kinds.items():
        if plots:
            written += save(plots, folder / f"{prefix}{kind}", note.strip(), columns)
    return written
