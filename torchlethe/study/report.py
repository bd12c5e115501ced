"""The report of a study: one HTML file that needs nothing else, for a screen, a phone or paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchlethe import __version__
from torchlethe.study.collect import row_title
from torchlethe.study.explain import READING
from torchlethe.study.figures import Plot, inline
from torchlethe.study.heatmap import class_panels
from torchlethe.study.panels import (
    bar_panels,
    curve_panels,
    histogram_panels,
    method_marks,
    pareto_panels,
    sentence_case,
)
from torchlethe.study.results import Cell, Results
from torchlethe.study.runner import ERROR, LOG, Outcome, now
from torchlethe.study.tables import (
    caption,
    gap_text,
    in_seed_distances,
    in_spreads,
    latex,
    number,
    signed,
    spread,
    std_text,
)

LOST = ("failed", "blocked")


class Column(NamedTuple):
    """The head of a table's column."""

    name: str
    title: str
    unit: str
    definition: str
    better: str


def render(
    results: Results, environment: Mapping[str, str], command: str, files: Mapping[str, str] | None = None
) -> str:
    """The report as HTML.

    Args:
        results: of :func:`~torchlethe.study.results.collect`.
        environment: labels and texts that say where the study ran.
        command: the shell command that reproduces it.
        files: what lies beside the report, by name.

    Returns:
        A complete HTML document without external resources.
    """
    from jinja2 import Environment, StrictUndefined

    loader = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    loader.filters["first_capital"] = sentence_case
    template = loader.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    names = dict.fromkeys(name for scenario in results.scenarios for name in results.metrics(scenario))
    return template.render(
        results=results,
        sections=[_section(results, scenario) for scenario in results.scenarios],
        headed=results.headed,
        caption=caption(results, "below it"),
        percent=any(results.definition(name).unit == "%" for name in names),
        reading=READING if results.reference else {},
        definitions=[column for name in names if (column := _column(results, name)).definition],
        undefined=[name for name in names if not results.definition(name).definition],
        facts=_facts(results),
        environment=dict(environment),
        command=command,
        stages=_stages(results),
        latex=latex(results) if results.runs else "",
        files=dict(files or {}),
        failures=_failures(results),
        log=LOG,
        version=__version__,
        finished=now(),
    )


def _section(results: Results, scenario: str) -> dict[str, Any]:
    marks = method_marks(results)
    columns = results.columns(scenario)
    methods = results.rows(scenario)
    return {
        "name": scenario,
        "title": results.titles[scenario],
        "finding": finding(results, scenario),
        "columns": [_column(results, name) for name in columns],
        "rows": [
            {
                "method": method,
                "mark": marks[method],
                "cells": [_cell(results, scenario, method, name) for name in columns],
                "anchor": _anchor(results, method),
                "note": _completeness(results, scenario, method),
            }
            for method in methods
        ],
        "lost": _lost_rows(results, scenario),
        "every": [
            {
                "column": _column(results, name),
                "cells": [_cell(results, scenario, method, name) for method in methods],
            }
            for name in results.metrics(scenario)
        ],
        "bars": _panels(bar_panels(results, scenario)),
        "curves": _panels(curve_panels(results, scenario)),
        "pareto": _panels(pareto_panels(results, scenario)),
        "classes": _panels(class_panels(results, scenario), "Change of each class: "),
        "histograms": _panels(histogram_panels(results, scenario), "Confidence on the forget set: "),
    }


def finding(results: Results, scenario: str) -> str:
    """The scenario's outcome in one sentence, or an empty string when there is nothing to compare."""
    methods = [method for method in results.methods if method not in (results.original, results.reference)]
    gaps = {method: cell for method in methods if (cell := results.cell(scenario, method, "average_gap"))}
    if not gaps or not results.reference:
        return ""
    best = min(gaps, key=lambda method: gaps[method].mean)
    text = f"{best} {'comes closest to' if len(gaps) > 1 else 'is compared with'} {results.reference}: "
    text += f"{number(gaps[best].mean, '%')} points apart on average"
    if results.original and (start := results.cell(scenario, results.original, "average_gap")):
        text += f" ({results.original}: {number(start.mean, '%')})"
    if speed := results.cell(scenario, best, "speed_up"):
        faster = speed.mean >= 1
        factor = number(speed.mean if faster else 1 / speed.mean, "×")
        text += f", and {factor} times {'faster' if faster else 'slower'}"
    return f"{text}."


def _panels(plots: list[Plot], prefix: str = "") -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [
        {"title": plot.title, "svg": Markup(inline(plot, prefix + plot.title)), "mark": plot.mark} for plot in plots
    ]


def _column(results: Results, metric: str) -> Column:
    found = results.definition(metric)
    unit = found.unit if found.unit not in ("×", "%") else ""
    return Column(metric, found.title, unit, found.definition, results.better(metric) or "")


def _cell(results: Results, scenario: str, method: str, metric: str) -> dict[str, Any] | None:
    cell = results.cell(scenario, method, metric)
    if cell is None:
        return None
    unit = results.definition(metric).unit
    return {
        "value": repr(cell.mean),
        "mean": number(cell.mean, unit),
        "std": std_text(cell, unit),
        "gap": None if cell.gap is None else signed(cell.gap, unit),
        "spreads": in_spreads(cell),
        "times": in_seed_distances(cell),
        "interval": _interval(cell, unit),
        "text": spread(cell, unit) + (f" ({gap})" if (gap := gap_text(cell, unit)) else ""),
        "best": results.best(scenario, metric) == method,
        "suffix": "×" if unit == "×" else "",
    }


def _interval(cell: Cell, unit: str) -> str:
    """The 95 % t-interval of the mean; empty for a single seed."""
    if not cell.interval:
        return ""
    low, high = (number(cell.mean + sign * cell.interval, unit) for sign in (-1, 1))
    return f"95 % t-interval of the mean: {low} to {high}"


def _anchor(results: Results, method: str) -> str:
    """The identifier of the block with a row's configurations; empty without one."""
    return next((_identifier(outcome) for outcome in results.outcomes if row_title(outcome.job) == method), "")


def _identifier(outcome: Outcome) -> str:
    return "stage-" + re.sub(r"[^A-Za-z0-9_-]+", "-", row_title(outcome.job) or outcome.job.stage.name)


def _completeness(results: Results, scenario: str, method: str) -> str:
    count = len(results.select(scenario, method))
    return f"{count} of {len(results.seeds)} seeds" if count < len(results.seeds) else ""


def _lost_rows(results: Results, scenario: str) -> list[str]:
    """The rows that have no result in a scenario because their runs failed."""
    here = [
        title
        for outcome in results.outcomes
        if outcome.status in LOST and outcome.job.scenario and outcome.job.scenario.name == scenario
        if (title := row_title(outcome.job)) and not results.select(scenario, title)
    ]
    return list(dict.fromkeys(here))


def _failures(results: Results) -> list[dict[str, Any]]:
    found = []
    for outcome in results.outcomes:
        if outcome.status not in LOST:
            continue
        path = outcome.job.folder / ERROR
        trace = without_places(path.read_text("utf-8")) if outcome.status == "failed" and path.is_file() else ""
        found.append({"title": outcome.job.title, "message": outcome.message, "trace": trace, "status": outcome.status})
    return sorted(found, key=lambda failure: failure["status"] == "blocked")


def without_places(text: str) -> str:
    """A traceback without the parts of its paths that only say whose machine it was."""
    for place, short in ((Path.cwd(), "."), (Path(__file__).resolve().parents[2], "…"), (Path.home(), "~")):
        if len(place.parts) > 1:
            text = text.replace(f"{place}/", f"{short}/")
    return re.sub(r'(File ")[^"]*/(site-packages|lib/python3\.\d+)/', r"\1…/\2/", text)


def _facts(results: Results) -> dict[str, str]:
    ran = [outcome for outcome in results.outcomes if outcome.status not in LOST]
    if not results.outcomes:
        return {}
    counts = {"scenario": len(results.titles), "method": len(results.methods), "seed": len(results.seeds)}
    if counts["scenario"] == 1:
        del counts["scenario"]
    facts = {word if count == 1 else f"{word}s": str(count) for word, count in counts.items()}
    facts["runs"] = f"{len(ran)} of {len(results.outcomes)}" if len(ran) < len(results.outcomes) else str(len(ran))
    return {**facts, "computing time": duration(sum(outcome.seconds for outcome in ran))}


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(4.24), duration(42.4), duration(3725)
        ('4.2 s', '42 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stages(results: Results) -> list[dict[str, Any]]:
    """What ran, by stage or row of the table: times, commands and configurations."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in results.outcomes:
        groups.setdefault(_identifier(outcome), []).append(outcome)
    stages: list[dict[str, Any]] = []
    for identifier, outcomes in groups.items():
        stage = outcomes[0].job.stage
        seconds = [outcome.seconds for outcome in outcomes if outcome.status not in LOST]
        stages.append(
            {
                "anchor": identifier,
                "title": row_title(outcomes[0].job) or stage.name,
                "name": stage.name if row_title(outcomes[0].job) else "",
                "note": stage.note,
                "count": f"{len(seconds)} of {len(outcomes)}" if len(seconds) < len(outcomes) else str(len(outcomes)),
                "mean": duration(sum(seconds) / len(seconds)) if seconds else "–",
                "longest": duration(max(seconds)) if seconds else "–",
                "total": duration(sum(seconds)) if seconds else "–",
                "share": sum(seconds),
                "runs": [_run(outcome) for outcome in outcomes],
            }
        )
    whole = max((stage["share"] for stage in stages), default=0.0) or 1.0
    return [{**stage, "share": f"{100 * stage['share'] / whole:.1f}"} for stage in stages]


def _run(outcome: Outcome) -> dict[str, str]:
    config, best = (outcome.job.folder / name for name in ("config.yaml", "best.yaml"))
    return {
        "title": outcome.job.title.partition(" · ")[2] or outcome.job.title,
        "status": outcome.status,
        "seconds": duration(outcome.seconds),
        "command": outcome.job.command,
        "config": config.read_text("utf-8") if config.is_file() else "",
        "best": best.read_text("utf-8") if best.is_file() else "",
    }
