"""From finished jobs to :class:`~torchlethe.study.results.Results`: reading what the stages left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torchlethe.functional.summary import AVERAGE_GAP_METRICS, average_gap
from torchlethe.study.files import read_json
from torchlethe.study.plan import Job
from torchlethe.study.results import Results, Run
from torchlethe.study.seeds import compare_seeds
from torchlethe.study.spec import Study
from torchlethe.study.stage import Outcome

FILES = ("metrics.json", "evaluation.json")
"""Where a stage leaves its numbers; the later file wins."""


def row_title(job: Job) -> str | None:
    """The row of the table that a job fills: that of its stage, or of its point of a grid; None for no row."""
    return job.stage.method


def collect(study: Study, outcomes: Iterable[Outcome]) -> Results:
    """Read the evaluations of all finished jobs.

    Args:
        study: the study.
        outcomes: of :func:`~torchlethe.study.runner.run_jobs`.
    """
    outcomes = tuple(outcomes)
    runs: list[Run] = []
    rows: dict[str, str] = {}
    told: dict[tuple[str, str, int], dict[str, float]] = {}
    for outcome in outcomes:
        job = outcome.job
        title = row_title(job)
        if not title or job.scenario is None or job.seed is None or outcome.status not in ("done", "kept"):
            continue
        rows.setdefault(job.stage.name, title)
        content: dict[str, Any] = {}
        for file in FILES:
            content |= read_json(job.folder / file)
        meta = content.pop("meta", {})
        metrics = plain_numbers(content)
        if not metrics:
            continue
        told[title, job.scenario.name, job.seed] = metrics
        # what the evaluation says about the other models is in their own rows
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("original_", "reference_"))}
        metrics["stage_seconds"] = outcome.seconds
        arrays, classes = job.folder / "evaluation.npz", per_class_of(content)
        runs.append(Run(title, job.scenario.name, job.seed, metrics, arrays, meta=meta, classes=classes))
    reference, original = (
        rows.get(name or "") or (study.stages[name].method if name else None)
        for name in (study.reference, study.original)
    )
    complete_reference(runs, reference, told)
    derive(runs, reference)
    between_seeds = compare_seeds(runs, reference)
    order = list(dict.fromkeys(title for outcome in outcomes if (title := row_title(outcome.job))))
    runs.sort(key=lambda run: (list(study.scenarios).index(run.scenario), order.index(run.method), run.seed))
    return Results(
        name=study.name,
        description=study.description,
        seeds=study.seeds,
        titles={name: scenario.title for name, scenario in study.scenarios.items()},
        runs=tuple(runs),
        outcomes=outcomes,
        reference=reference,
        original=original,
        chosen=study.metrics,
        source=study.path.read_text("utf-8"),
        order=tuple(order),
        between_seeds=between_seeds,
    )


def per_class_of(content: Mapping[str, Any], part: str = "") -> dict[str, Any]:
    """The accuracy of each class of one model out of an evaluation; empty where it has none, as an older one.

    Args:
        content: of ``evaluation.json``.
        part: the model: ``""`` for the evaluated one, ``original`` or ``reference``.

    Returns:
        ``accuracy``, ``counts`` and ``names``.

    Example:
        >>> per_class_of({"per_class": {"accuracy": {"test": [90.0, None]}, "counts": {"test": [10, 0]}}})["accuracy"]
        {'test': [90.0, None]}
    """
    found = content.get("per_class")
    if not isinstance(found, Mapping) or not found.get(part or "accuracy"):
        return {}
    return {
        "accuracy": found[part or "accuracy"],
        "counts": found.get("counts", {}),
        "names": found.get("names"),
        "reference": found.get("reference", {}),
    }


def complete_reference(
    runs: Iterable[Run], reference: str | None, told: Mapping[tuple[str, str, int], Mapping[str, float]]
) -> None:
    """Add to the reference's rows what only the other runs measured of it, such as its relearning time.

    Args:
        runs: of all rows.
        reference: title of the reference's row.
        told: everything that each run's evaluation says, by row, scenario and seed.
    """
    own = {(run.scenario, run.seed): run.metrics for run in runs if run.method == reference}
    for (title, scenario, seed), metrics in told.items():
        if title != reference and (scenario, seed) in own:
            for name, value in metrics.items():
                if name.startswith("reference_"):
                    own[scenario, seed].setdefault(name.removeprefix("reference_"), value)


def plain_numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a JSON object; texts, lists and the ``null`` of a diverged run are left out.

    Example:
        >>> plain_numbers({"test_accuracy": 93, "zrf": None, "name": "x", "done": True})
        {'test_accuracy': 93.0}
    """
    numbers = {name: value for name, value in content.items() if type(value) in (int, float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def derive(runs: Iterable[Run], reference: str | None) -> None:
    """Add the average gap and the speed-up where an evaluation did not know its reference.

    Args:
        runs: whose metrics get the new ones.
        reference: title of the reference's row.
    """
    runs = list(runs)
    known = {(run.scenario, run.seed): run.metrics for run in runs if run.method == reference}
    for run in runs:
        other = known.get((run.scenario, run.seed))
        if other is None:
            continue
        compared = all(name in run.metrics and name in other for name in AVERAGE_GAP_METRICS)
        if compared and "average_gap" not in run.metrics and other is not run.metrics:
            run.metrics["average_gap"] = average_gap(run.metrics, other)
        if other is run.metrics and other.get("relearning_steps"):
            other["relearning_ratio"] = 1.0
        if run.metrics.get("run_seconds") and "run_seconds" in other:
            run.metrics["speed_up"] = other["run_seconds"] / run.metrics["run_seconds"]
