"""What the stages measured, brought together: one number per method, scenario, seed and metric."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchlethe.functional.summary import AVERAGE_GAP_METRICS, average_gap
from torchlethe.metrics.definitions import MetricDefinition, define_metric
from torchlethe.study.plan import Job
from torchlethe.study.runner import Outcome, read_json
from torchlethe.study.spec import Scenario, Study

SHOWN = (
    "forget_accuracy",
    "remain_accuracy",
    "test_accuracy",
    "test_forget_accuracy",
    "test_remain_accuracy",
    "mia_entropy_logistic",
    "average_gap",
    "kl_to_reference",
    "run_seconds",
    "speed_up",
)
DERIVED = ("average_gap", "run_seconds", "speed_up")


@dataclass(frozen=True)
class Run:
    """One evaluated run.

    Attributes:
        method: title of its row.
        scenario: name of its scenario.
        seed: its seed.
        job: the job it came from.
        metrics: by name; the derived ones included.
        meta: what else the evaluation recorded.
    """

    method: str
    scenario: str
    seed: int
    job: Job
    metrics: dict[str, float]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A metric of one method in one scenario, over seeds.

    Attributes:
        values: one per seed.
        gaps: value minus the reference's of the same seed; empty without a reference.
    """

    values: tuple[float, ...]
    gaps: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def gap(self) -> float | None:
        """Mean signed difference to the reference."""
        return statistics.fmean(self.gaps) if self.gaps else None


@dataclass(frozen=True)
class Results:
    """All runs of a study.

    Attributes:
        study: the study.
        runs: the evaluated runs, by scenario, method and seed.
        outcomes: what became of each job.
    """

    study: Study
    runs: tuple[Run, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def reference(self) -> str | None:
        """The title of the reference's row."""
        stage = self.study.stages.get(self.study.reference or "")
        return stage.method if stage else None

    @property
    def original(self) -> str | None:
        """The title of the row of the model before unlearning."""
        stage = self.study.stages.get(self.study.original or "")
        return stage.method if stage else None

    @property
    def methods(self) -> list[str]:
        """The rows that have results: the original model, the reference, then the methods in the file's order."""
        present = {run.method for run in self.runs}
        first = [title for title in (self.original, self.reference) if title]
        return [title for title in dict.fromkeys([*first, *self.study.methods]) if title in present]

    @property
    def scenarios(self) -> list[Scenario]:
        """The scenarios that have results."""
        present = {run.scenario for run in self.runs}
        return [scenario for name, scenario in self.study.scenarios.items() if name in present]

    def select(self, scenario: str, method: str) -> list[Run]:
        """The runs of one method in one scenario, by seed."""
        return [run for run in self.runs if run.scenario == scenario and run.method == method]

    def metrics(self, scenario: str | None = None) -> list[str]:
        """Every metric that was measured, the usual ones first."""
        found = {name for run in self.runs if scenario in (None, run.scenario) for name in run.metrics}
        first = [name for name in (*self.study.metrics, *SHOWN) if name in found]
        return list(dict.fromkeys([*first, *sorted(found)]))

    def columns(self, scenario: str) -> list[str]:
        """The metrics of the main table of a scenario."""
        return [name for name in self.metrics(scenario) if name in (self.study.metrics or SHOWN)]

    def cell(self, scenario: str, method: str, metric: str) -> Cell | None:
        """One metric of one method over seeds; None when it was not measured."""
        runs = [run for run in self.select(scenario, method) if metric in run.metrics]
        if not runs:
            return None
        reference = {run.seed: run.metrics for run in self.select(scenario, self.reference or "")}
        pairs = [(run.metrics[metric], reference.get(run.seed, {}).get(metric)) for run in runs]
        gaps = [value - other for value, other in pairs if other is not None]
        comparable = metric not in DERIVED and definition(metric).orientation == "reference"
        own = method == self.reference
        return Cell(tuple(value for value, _ in pairs), tuple(gaps) if comparable and not own else ())

    def best(self, scenario: str, metric: str) -> str | None:
        """The method that does best by a metric, out of at least two; original and reference do not compete."""
        cells = {
            method: cell
            for method in self.methods
            if method not in (self.original, self.reference) and (cell := self.cell(scenario, method, metric))
        }
        if len(cells) < 2:
            return None
        orientation = definition(metric).orientation

        def badness(method: str) -> float:
            cell = cells[method]
            if orientation == "reference":
                return abs(cell.gap) if cell.gap is not None else math.inf
            return cell.mean if orientation == "lower" else -cell.mean

        ranked = sorted(cells, key=badness)
        return ranked[0] if badness(ranked[0]) < badness(ranked[1]) else None

    def confidences(self, scenario: str, method: str, part: str = "forget") -> np.ndarray:
        """Confidences in the true label after the run, the samples of all seeds together.

        Args:
            scenario: its name.
            method: title of the row.
            part: the set of samples.

        Returns:
            ``(N,)`` values in [0, 1]; empty when nothing was recorded.
        """
        found = []
        for run in self.select(scenario, method):
            path = run.job.folder / "evaluation.npz"
            if path.is_file():
                with np.load(path, allow_pickle=False) as arrays:
                    key = f"confidence_{part}"
                    if key in arrays.files:
                        found.append(arrays[key].ravel())
        return np.concatenate(found) if found else np.empty(0)


def definition(metric: str) -> MetricDefinition:
    """The definition of a metric; one without further knowledge for a foreign name."""
    return define_metric(metric) or MetricDefinition(metric.replace("_", " "), "", "", "reference")


def collect(study: Study, outcomes: Iterable[Outcome]) -> Results:
    """Read the evaluations of all finished jobs.

    Args:
        study: the study.
        outcomes: of :func:`~torchlethe.study.runner.run_jobs`.
    """
    outcomes = tuple(outcomes)
    runs: list[Run] = []
    for outcome in outcomes:
        job = outcome.job
        if not job.stage.method or job.scenario is None or job.seed is None or outcome.status not in ("done", "kept"):
            continue
        evaluation = read_json(job.folder / "evaluation.json")
        meta = evaluation.pop("meta", {})
        metrics = {name: float(value) for name, value in evaluation.items() if isinstance(value, int | float)}
        # what the evaluation says about the other models is in their own rows
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("original_", "reference_"))}
        runs.append(Run(job.stage.method, job.scenario.name, job.seed, job, metrics, meta))
    reference = {(run.scenario, run.seed): run.metrics for run in runs if run.job.stage.name == study.reference}
    for run in runs:
        other = reference.get((run.scenario, run.seed))
        if other is None:
            continue
        compared = all(name in run.metrics and name in other for name in AVERAGE_GAP_METRICS)
        if compared and "average_gap" not in run.metrics and other is not run.metrics:
            run.metrics["average_gap"] = average_gap(run.metrics, other)
        if run.metrics.get("run_seconds") and "run_seconds" in other:
            run.metrics["speed_up"] = other["run_seconds"] / run.metrics["run_seconds"]
    order = list(study.methods)
    runs.sort(key=lambda run: (list(study.scenarios).index(run.scenario), order.index(run.method), run.seed))
    return Results(study, tuple(runs), outcomes)


def digits(value: float, metric: str) -> int:
    """How many decimals a number of this size deserves."""
    unit = definition(metric).unit
    if unit in ("%", "×"):
        return 1
    if unit == "s":
        return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3


def number(value: float, metric: str, decimals: int | None = None) -> str:
    """A number with as many decimals as its metric deserves, with a true minus sign.

    Args:
        value: the number.
        metric: its metric.
        decimals: how many decimals to show instead.

    Example:
        >>> number(97.1234, "forget_accuracy"), number(0.4567, "kl_to_reference"), number(-0.01, "test_accuracy")
        ('97.1', '0.457', '0.0')
    """
    text = f"{value:.{digits(value, metric) if decimals is None else decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def spread(cell: Cell, metric: str) -> str:
    """Mean and standard deviation as text."""
    mean = number(cell.mean, metric)
    return mean if cell.std is None else f"{mean} ± {number(cell.std, metric, digits(cell.mean, metric))}"


def signed(value: float, metric: str) -> str:
    """A difference with its sign."""
    text = number(value, metric)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def markdown(results: Results) -> str:
    """The table of every scenario in Markdown: mean ± standard deviation over seeds, difference to the reference."""
    lines = [f"# {results.study.name}", ""]
    if results.study.description:
        lines += [results.study.description, ""]
    for scenario in results.scenarios:
        columns = results.columns(scenario.name)
        if len(results.study.scenarios) > 1:
            lines += [f"## {scenario.title}", ""]
        lines.append(_row(["method", *(heading(name) for name in columns)]))
        lines.append(_row(["---", *("---:" for _ in columns)]))
        for method in results.methods:
            cells = []
            for name in columns:
                cell = results.cell(scenario.name, method, name)
                text = spread(cell, name) if cell else "–"
                if cell and cell.gap is not None:
                    text += f" ({signed(cell.gap, name)})"
                cells.append(f"**{text}**" if results.best(scenario.name, name) == method else text)
            lines.append(_row([method, *cells]))
        lines.append("")
    lines += [caption(results), ""]
    return "\n".join(lines)


def heading(metric: str) -> str:
    """A column's head with its unit."""
    found = definition(metric)
    return f"{found.title} / {found.unit}" if found.unit and found.unit != "×" else found.title


def caption(results: Results, place: str = "in parentheses") -> str:
    """What the numbers of the table are, in words.

    Args:
        results: the results.
        place: where the table shows the difference to the reference.
    """
    seeds = len(results.study.seeds)
    text = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    if results.reference:
        text += f"; {place} the difference to {results.reference}"
    if any(results.best(s.name, m) for s in results.scenarios for m in results.columns(s.name)):
        closest = f"closest to {results.reference}, or " if results.reference else ""
        text += f"; the best method of each column is bold ({closest}lowest or highest)"
    return text + "."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_csv(results: Results) -> str:
    """Every metric in a tidy table: one line per scenario, method and metric, one column per seed."""
    seeds = results.study.seeds
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seed_names = [f"seed_{seed}" for seed in seeds]
    writer.writerow(["scenario", "method", "metric", "unit", "mean", "std", "runs", "gap_to_reference", *seed_names])
    for scenario in results.scenarios:
        for method in results.methods:
            by_seed = {run.seed: run.metrics for run in results.select(scenario.name, method)}
            for name in results.metrics(scenario.name):
                if (cell := results.cell(scenario.name, method, name)) is None:
                    continue
                values = [by_seed.get(seed, {}).get(name, "") for seed in seeds]
                std, gap = ("" if value is None else value for value in (cell.std, cell.gap))
                unit = definition(name).unit
                writer.writerow([scenario.name, method, name, unit, cell.mean, std, len(cell.values), gap, *values])
    return text.getvalue()
