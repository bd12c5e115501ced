"""What the stages measured, brought together: one number per method, scenario, seed and metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchlethe.functional.summary import AVERAGE_GAP_METRICS
from torchlethe.metrics.definitions import MetricDefinition, define_metric
from torchlethe.study.stage import Outcome

SHOWN = (
    "forget_accuracy",
    "remain_accuracy",
    "test_accuracy",
    "test_forget_accuracy",
    "test_remain_accuracy",
    "mia_entropy_logistic",
    "average_gap",
    "average_gap_in_sigma",
    "kl_to_reference",
    "relearning_steps",
    "run_seconds",
    "speed_up",
)
SUMMARIES = ("average_gap_of_means", "average_gap_in_sigma")
DERIVED = ("average_gap", *SUMMARIES, "run_seconds", "speed_up", "stage_seconds", "relearning_ratio")
OWN_DEFINITIONS = {
    "stage_seconds": MetricDefinition(
        "stage time", "Seconds of the whole stage, with its start, validation and evaluation.", "s", "lower"
    ),
    "average_gap_of_means": MetricDefinition(
        "avg. gap of means",
        "The average gap between the means over seeds; never larger than the average gap, which is each seed's.",
        "%",
        "lower",
    ),
    "average_gap_in_sigma": MetricDefinition(
        "avg. gap in σ",
        "Mean of the sizes in σ of the four gaps of the average gap; σ is Retrain's standard deviation over its seeds, "
        "but at least the weight of a single sample. Below about 1 is what other seeds alone change.",
        "",
        "lower",
    ),
}
CURVE = "_curve"
# a reference's spread below this share of its values is rounding noise
NO_SPREAD = 1e-9

Better = Literal["reference", "higher", "lower"] | None


@dataclass(frozen=True)
class Run:
    """One evaluated model.

    Attributes:
        method: title of its row.
        scenario: name of its scenario.
        seed: its seed.
        metrics: by name; the derived ones included.
        arrays: the ``.npz`` file of its evaluation, which need not exist.
        part: whose arrays of that file are its own: ``""``, or those of the ``original`` or the ``reference``.
        meta: what else the evaluation recorded.
        classes: the accuracy of each class by set, see :func:`~torchlethe.study.collect.per_class_of`; may be empty.
    """

    method: str
    scenario: str
    seed: int
    metrics: dict[str, float]
    arrays: Path
    part: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, Any] = field(default_factory=dict)

    def confidence(self, samples: str) -> np.ndarray:
        """(N,) confidences in the true label on a set of samples; empty when they were not recorded."""
        key = f"confidence_{samples}_{self.part}".rstrip("_")
        if self.arrays.is_file():
            with np.load(self.arrays, allow_pickle=False) as arrays:
                if key in arrays.files:
                    return arrays[key].ravel()
        return np.empty(0)

    def curves(self) -> dict[str, np.ndarray]:
        """What was recorded over epochs: the arrays whose names end in ``_curve``, by the rest of the name."""
        if not self.arrays.is_file():
            return {}
        with np.load(self.arrays, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.endswith(CURVE)]
            return {name.removesuffix(CURVE): arrays[name].astype(float).ravel() for name in names}


@dataclass(frozen=True)
class Cell:
    """A metric of one method in one scenario, over seeds.

    Attributes:
        values: one per seed.
        gaps: value minus the reference's of the same seed; empty without a reference.
        spread: standard deviation of the reference over its seeds; None without one, or where it is zero.
        seed_distance: for a distance to the reference, the mean distance of the reference's seeds to each other; None
            where it is unknown or zero.
    """

    values: tuple[float, ...]
    gaps: tuple[float, ...] = ()
    spread: float | None = None
    seed_distance: float | None = None

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

    @property
    def gap_in_spreads(self) -> float | None:
        """Size of the gap in standard deviations of the reference over its seeds."""
        return None if self.gap is None or not self.spread else abs(self.gap) / self.spread

    @property
    def in_seed_distances(self) -> float | None:
        """A distance as a multiple of that between two seeds of the reference."""
        return self.mean / self.seed_distance if self.seed_distance else None

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % t-interval of the mean over seeds; None for a single one."""
        from scipy.stats import t  # only programs ask for it

        count = len(self.values)
        return None if self.std is None else float(t.ppf(0.975, count - 1)) * self.std / math.sqrt(count)


@dataclass(frozen=True)
class Results:
    """All runs of a study, or of anything else that has rows and metrics.

    Attributes:
        name: title of the report.
        description: a paragraph below it.
        seeds: the seeds that each method was to run with.
        titles: of all scenarios, by name.
        runs: the evaluated runs, by scenario, method and seed.
        outcomes: what became of each job.
        reference: title of the row that gaps are measured against.
        original: title of the row of the model before unlearning.
        chosen: the metrics to show, in order; empty for the usual ones.
        source: text of the study file.
        order: titles of all rows, in the study's order; that of the runs when empty.
        between_seeds: the metrics that in the reference's row compare its seeds with each other.
    """

    name: str
    description: str
    seeds: tuple[int, ...]
    titles: Mapping[str, str]
    runs: tuple[Run, ...]
    outcomes: tuple[Outcome, ...] = ()
    reference: str | None = None
    original: str | None = None
    chosen: tuple[str, ...] = ()
    source: str = ""
    order: tuple[str, ...] = ()
    between_seeds: frozenset[str] = frozenset()
    _cells: dict[tuple[str, str, str], Cell | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _by_row(self) -> dict[tuple[str, str], list[Run]]:
        found: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.scenario, run.method), []).append(run)
        return found

    @cached_property
    def methods(self) -> list[str]:
        """The rows that have results: the original model, the reference, then the methods in the study's order."""
        first = [title for title in (self.original, self.reference) if title]
        present = dict.fromkeys(run.method for run in self.runs)
        return [title for title in dict.fromkeys([*first, *self.order, *present]) if title in present]

    def rows(self, scenario: str) -> list[str]:
        """The methods that have results in one scenario: a stage may leave some out."""
        return [method for method in self.methods if self.select(scenario, method)]

    @property
    def scenarios(self) -> list[str]:
        """The names of the scenarios that have results."""
        present = {run.scenario for run in self.runs}
        return [name for name in self.titles if name in present]

    @cached_property
    def unlearning(self) -> bool:
        """Whether anything was to be forgotten, so that a metric is good where it is close to the reference's."""
        return any("forget_accuracy" in run.metrics for run in self.runs)

    @property
    def headed(self) -> bool:
        """Whether scenarios have headings: there are several, or the only one has a title that somebody gave it."""
        return len(self.titles) > 1 or any(title != name.replace("_", " ") for name, title in self.titles.items())

    def select(self, scenario: str, method: str) -> list[Run]:
        """The runs of one method in one scenario, by seed."""
        return self._by_row.get((scenario, method), [])

    def metrics(self, scenario: str | None = None) -> list[str]:
        """Every metric that was measured: the chosen ones first, then the usual ones, then the others as they come."""
        found = dict.fromkeys(name for run in self.runs if scenario in (None, run.scenario) for name in run.metrics)
        if "average_gap" in found and len(self.seeds) > 1:
            here = self.scenarios if scenario is None else [scenario]
            pairs = [(place, method) for place in here for method in self.methods]
            found |= {name: None for name in SUMMARIES if any(self.cell(*pair, name) for pair in pairs)}
        usual = [name for name in SHOWN if name not in DERIVED or self.unlearning]
        return [name for name in dict.fromkeys([*self.chosen, *usual, *found]) if name in found]

    def columns(self, scenario: str) -> list[str]:
        """The metrics of the main table of a scenario."""
        names = self.metrics(scenario)
        if self.chosen:
            return [name for name in names if name in self.chosen]
        if self.unlearning:
            return [name for name in names if name in SHOWN]
        main = [name for name in names if name != "stage_seconds" and not _secondary(name)]
        return [*main, *(name for name in ("stage_seconds",) if name in names and "run_seconds" not in names)]

    @property
    def missing(self) -> list[str]:
        """The chosen metrics that no run measured."""
        found = self.metrics()
        return [name for name in self.chosen if name not in found]

    def definition(self, metric: str) -> MetricDefinition:
        """What a metric means here; one that the catalogue lacks keeps its own name and has no definition.

        Plain training logs accuracies as fractions, evaluations give percent: where no value exceeds 1, the former.
        """
        found = OWN_DEFINITIONS.get(metric) or define_metric(metric)
        if found is None:
            return MetricDefinition(metric, "", "", "reference")
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        if found.unit == "%" and not self.unlearning and values and max(values) <= 1:
            return found._replace(definition=found.definition.replace("Percentage of", "Share of"), unit="")
        return found

    def better(self, metric: str) -> Better:
        """What is good in a metric; None when nobody knows, as for one that the catalogue lacks."""
        known = OWN_DEFINITIONS.get(metric) or define_metric(metric)
        if known is not None and (self.unlearning or known.orientation != "reference"):
            return known.orientation
        if metric.endswith("accuracy"):
            return "higher"
        return "lower" if metric.endswith(("loss", "error")) else None

    def cell(self, scenario: str, method: str, metric: str) -> Cell | None:
        """One metric of one method over seeds; None when it was not measured."""
        key = scenario, method, metric
        if key not in self._cells:  # every table and plot asks for them
            self._cells[key] = self._make_cell(*key)
        return self._cells[key]

    def _make_cell(self, scenario: str, method: str, metric: str) -> Cell | None:
        if metric in SUMMARIES:
            return self._summary(scenario, method, metric)
        runs = [run for run in self.select(scenario, method) if metric in run.metrics]
        if not runs:
            return None
        values = tuple(run.metrics[metric] for run in runs)
        comparable = metric not in DERIVED and (not self.unlearning or self.better(metric) in ("reference", None))
        if method == self.reference:
            return Cell(values)
        if not comparable:
            between = metric in self.between_seeds and self.better(metric) == "lower"
            own = self.cell(scenario, self.reference or "", metric) if between else None
            return Cell(values, seed_distance=own.mean if own and own.mean > 0 else None)
        others = {
            run.seed: run.metrics[metric]
            for run in self.select(scenario, self.reference or "")
            if metric in run.metrics
        }
        gaps = tuple(run.metrics[metric] - others[run.seed] for run in runs if run.seed in others)
        spread = statistics.stdev(others.values()) if len(others) > 1 else 0.0
        level = max((abs(value) for value in others.values()), default=0.0)
        return Cell(values, gaps, spread if spread > NO_SPREAD * max(level, 1.0) else None)

    def _summary(self, scenario: str, method: str, metric: str) -> Cell | None:
        """A number that all seeds of a row give together."""
        runs = self.select(scenario, method)
        if not runs or method == self.reference or len(self.seeds) < 2:
            return None
        cells = {name: self.cell(scenario, method, name) for name in gap_names(runs[0].meta)}
        sizes = []
        for name, cell in cells.items():
            if cell is None or cell.gap is None:
                return None
            if metric == "average_gap_of_means":
                sizes.append(abs(cell.gap))
                continue
            counts = runs[0].meta.get("counts", {})
            samples = counts.get(name.removesuffix("_accuracy"), counts.get("forget"))
            unit = max(cell.spread or 0.0, 100.0 / samples if samples else 0.0)
            if unit:
                sizes.append(abs(cell.gap) / unit)
        known = len(self.select(scenario, self.reference or "")) > 1
        return Cell((statistics.fmean(sizes),)) if sizes and known else None

    def best(self, scenario: str, metric: str) -> str | None:
        """The method that does best by a metric, out of at least two.

        Original and reference do not compete in unlearning, where one is the start and the other the goal.
        """
        aside = (self.original, self.reference) if self.unlearning else ()
        competing = [method for method in self.methods if method not in aside]
        cells = {method: cell for method in competing if (cell := self.cell(scenario, method, metric))}
        better = self.better(metric)
        if len(cells) < 2 or better is None:
            return None

        def badness(method: str) -> float:
            cell = cells[method]
            if better == "reference":
                return abs(cell.gap) if cell.gap is not None else math.inf
            return cell.mean if better == "lower" else -cell.mean

        ranked = sorted(cells, key=badness)
        return ranked[0] if badness(ranked[0]) < badness(ranked[1]) else None

    def confidences(self, scenario: str, method: str, samples: str = "forget") -> np.ndarray:
        """Confidences in the true label after the run, the samples of all seeds together.

        Args:
            scenario: its name.
            method: title of the row.
            samples: the set of samples.

        Returns:
            ``(N,)`` values in [0, 1]; empty when nothing was recorded.
        """
        found = [run.confidence(samples) for run in self.select(scenario, method)]
        return np.concatenate(found) if found else np.empty(0)


def gap_names(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics of a run's average gap: forget, remain and test accuracy, and the first attack of its settings."""
    attacks = (meta.get("settings") or {}).get("membership") or ()
    return (*AVERAGE_GAP_METRICS[:3], f"mia_{attacks[0]}") if attacks else AVERAGE_GAP_METRICS


def _secondary(name: str) -> bool:
    """Whether a logged value says how training went, not how good the result is."""
    return name.startswith(("train_", "lr-")) or name.endswith("_step") or name in ("epoch", "step")
