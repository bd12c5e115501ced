"""The report of a study: one HTML file that needs nothing else, for a screen, a phone or paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlethe import __version__
from torchlethe.study.figures import MARKS, Bar, bars, histogram
from torchlethe.study.results import Cell, Results, caption, definition, digits, number, signed, spread
from torchlethe.study.runner import LOG, now
from torchlethe.study.spec import Scenario

BARS = ("forget_accuracy", "remain_accuracy", "test_accuracy", "mia_entropy_logistic", "average_gap", "run_seconds")


@dataclass(frozen=True)
class Column:
    """The head of a table's column."""

    title: str
    unit: str
    definition: str


@dataclass(frozen=True)
class Panel:
    """One figure with its caption."""

    title: str
    svg: str
    mark: int = 0


def render(results: Results, environment: Mapping[str, str], command: str) -> str:
    """The report as HTML.

    Args:
        results: of :func:`~torchlethe.study.results.collect`.
        environment: labels and texts that say where the study ran.
        command: the shell command that reproduces it.

    Returns:
        A complete HTML document without external resources.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    marks = method_marks(results)
    loader = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = loader.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    sections = [
        {
            "scenario": scenario,
            "finding": finding(results, scenario),
            "columns": [_column(name) for name in results.columns(scenario.name)],
            "rows": [
                {"method": method, "mark": marks[method], "cells": _cells(results, scenario.name, method)}
                for method in results.methods
            ],
            "bars": [_safe(panel, Markup) for panel in _bar_panels(results, scenario.name, marks)],
            "histograms": [_safe(panel, Markup) for panel in _histogram_panels(results, scenario.name, marks)],
        }
        for scenario in results.scenarios
    ]
    names = dict.fromkeys(name for scenario in results.scenarios for name in results.columns(scenario.name))
    study = results.study
    return template.render(
        study=study,
        results=results,
        sections=sections,
        several=len(study.scenarios) > 1,
        caption=caption(results, "below it"),
        definitions=[_column(name) for name in names],
        facts=_facts(results),
        environment=dict(environment),
        command=command,
        source=study.path.read_text("utf-8"),
        stages=_stages(results),
        failures=[outcome for outcome in results.outcomes if outcome.status in ("failed", "blocked")],
        log=LOG,
        version=__version__,
        finished=now(),
    )


def method_marks(results: Results) -> dict[str, int]:
    """The colour of each method: 0 for the original, 1 for the reference, then the methods in order."""
    marks = {results.original: 0, results.reference: 1}
    others = [method for method in results.methods if method not in marks]
    # more methods than colours: start over behind the two that are reserved
    return {method: marks.get(method, 0) for method in results.methods} | {
        method: 2 + index % (len(MARKS) - 2) for index, method in enumerate(others)
    }


def finding(results: Results, scenario: Scenario) -> str:
    """The scenario's outcome in one sentence, or an empty string when there is nothing to compare."""
    methods = [method for method in results.methods if method not in (results.original, results.reference)]
    gaps = {method: cell for method in methods if (cell := results.cell(scenario.name, method, "average_gap"))}
    if not gaps or not results.reference:
        return ""
    best = min(gaps, key=lambda method: gaps[method].mean)
    text = f"{best} {'comes closest to' if len(gaps) > 1 else 'is compared with'} {results.reference}: "
    text += f"{number(gaps[best].mean, 'average_gap')} points apart on average"
    if results.original and (start := results.cell(scenario.name, results.original, "average_gap")):
        text += f" ({results.original}: {number(start.mean, 'average_gap')})"
    if speed := results.cell(scenario.name, best, "speed_up"):
        faster = speed.mean >= 1
        factor = number(speed.mean if faster else 1 / speed.mean, "speed_up")
        text += f", and {factor} times {'faster' if faster else 'slower'}"
    return f"{text}."


def _safe(panel: Panel, markup: Any) -> dict[str, Any]:
    return {"title": panel.title, "svg": markup(panel.svg), "mark": panel.mark}


def _column(metric: str) -> Column:
    found = definition(metric)
    return Column(found.title, found.unit if found.unit != "×" else "", found.definition)


def _cells(results: Results, scenario: str, method: str) -> list[dict[str, Any] | None]:
    cells: list[dict[str, Any] | None] = []
    for name in results.columns(scenario):
        cell = results.cell(scenario, method, name)
        if cell is None:
            cells.append(None)
            continue
        cells.append(
            {
                "mean": number(cell.mean, name),
                "std": None if cell.std is None else number(cell.std, name, digits(cell.mean, name)),
                "gap": None if cell.gap is None else signed(cell.gap, name),
                "best": results.best(scenario, name) == method,
                "suffix": "×" if definition(name).unit == "×" else "",
            }
        )
    return cells


def _bar(method: str, cell: Cell, metric: str, mark: int) -> Bar:
    return Bar(method, cell.mean, cell.std, spread(cell, metric), mark)


def _bar_panels(results: Results, scenario: str, marks: Mapping[str, int]) -> list[Panel]:
    panels = []
    for name in BARS:
        rows = [
            _bar(method, cell, name, marks[method])
            for method in results.methods
            if (cell := results.cell(scenario, method, name))
        ]
        if not rows:
            continue
        found = definition(name)
        percent = found.unit == "%" and found.orientation == "reference"
        line = next((row for row in rows if row.label == results.reference and percent), None)
        title = f"{found.title}, {found.unit}" if found.unit else found.title
        panels.append(Panel(title, bars(rows, title, 100 if percent else None, line)))
    return panels


def _histogram_panels(results: Results, scenario: str, marks: Mapping[str, int]) -> list[Panel]:
    reference = results.confidences(scenario, results.reference or "")
    original = results.confidences(scenario, results.original or "")
    panels = []
    for method in results.methods:
        values = results.confidences(scenario, method)
        if method in (results.original, results.reference) or not len(values):
            continue
        title = f"Confidence of {method} on the forget set"
        panels.append(Panel(method, histogram(values, original, reference, marks[method], title), marks[method]))
    return panels


def _facts(results: Results) -> dict[str, str]:
    study = results.study
    ran = [outcome for outcome in results.outcomes if outcome.status in ("done", "kept")]
    facts = {
        "methods": str(len(results.methods)),
        "seeds": str(len(study.seeds)),
        "runs": f"{len(ran)} of {len(results.outcomes)}" if len(ran) < len(results.outcomes) else str(len(ran)),
        "computing time": duration(sum(outcome.seconds for outcome in ran)),
    }
    if len(study.scenarios) > 1:
        facts = {"requests": str(len(study.scenarios)), **facts}
    return facts


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(42.4), duration(3725)
        ('42 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stages(results: Results) -> list[dict[str, Any]]:
    stages = []
    for stage in results.study.stages.values():
        runs = []
        for outcome in results.outcomes:
            if outcome.job.stage is not stage:
                continue
            config = outcome.job.folder / "config.yaml"
            title = outcome.job.title.removeprefix(f"{stage.name} · ")
            runs.append(
                {
                    "title": title,
                    "status": outcome.status,
                    "seconds": duration(outcome.seconds),
                    "command": outcome.job.command,
                    "config": config.read_text("utf-8") if config.is_file() else "",
                }
            )
        stages.append({"stage": stage, "runs": runs})
    return stages
