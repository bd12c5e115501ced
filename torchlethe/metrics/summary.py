"""Average gap and tug of war over several runs, and a clock for the runtime efficiency."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from torchlethe.arguments import check_choice
from torchlethe.functional.summary import AVERAGE_GAP_METRICS, TUG_OF_WAR_METRICS, average_gap, tug_of_war


class _OverRuns(Metric):
    """Keeps the named metrics of several runs (seeds) and of their references."""

    full_state_update = False
    is_differentiable = False
    values: list[Tensor]
    references: list[Tensor]

    def __init__(self, names: Sequence[str], over: Literal["runs", "means"] = "runs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice(("runs", "means"), over=over)
        if not names:
            raise ValueError("names is empty: give at least one metric to compare with the reference.")
        self.names = tuple(names)
        self.over = over
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("references", default=[], dist_reduce_fx="cat")

    def update(self, metrics: Mapping[str, float], reference: Mapping[str, float]) -> None:
        """Add one run.

        Args:
            metrics: the judged model's metrics, in percent.
            reference: Retrain's of the same split, in percent.

        Raises:
            ValueError: one of ``names`` is missing on a side.
        """
        for title, given, state in (("metrics", metrics, self.values), ("reference", reference, self.references)):
            missing = [name for name in self.names if name not in given]
            if missing:
                raise ValueError(f"{title} lacks {', '.join(missing)}, which the comparison needs.")
            row = [float(given[name]) for name in self.names]
            state.append(torch.tensor([row], dtype=torch.float64, device=self.device))

    def _pairs(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        values, references = dim_zero_cat(self.values), dim_zero_cat(self.references)
        if self.over == "means":
            values, references = values.mean(dim=0, keepdim=True), references.mean(dim=0, keepdim=True)
        rows = zip(values.tolist(), references.tolist(), strict=True)
        return [(dict(zip(self.names, a, strict=True)), dict(zip(self.names, b, strict=True))) for a, b in rows]


class AverageGap(_OverRuns):
    """Average gap to Retrain (Avg. gap, Avg.D) over runs; lower is better, 0 is indistinguishable.

    Args:
        names: metrics to compare; SFRon's choice FA, RA, TA and entropy attack by default.
        over: ``runs`` averages the gap of each run (never smaller); ``means`` takes the gap of the means over runs, as
            DualOptim's tables do. Say which in a table.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar ≥ 0, in the unit of the metrics (percent by custom).

    Example:
        >>> over_runs, over_means = AverageGap(["test_accuracy"]), AverageGap(["test_accuracy"], over="means")
        >>> for metric in (over_runs, over_means):
        ...     metric.update({"test_accuracy": 91.0}, {"test_accuracy": 90.0})
        ...     metric.update({"test_accuracy": 89.0}, {"test_accuracy": 90.0})
        >>> over_runs.compute().item(), over_means.compute().item()
        (1.0, 0.0)
    """

    higher_is_better = False

    def __init__(
        self, names: Sequence[str] = AVERAGE_GAP_METRICS, over: Literal["runs", "means"] = "runs", **kwargs: Any
    ) -> None:
        super().__init__(names, over, **kwargs)

    def compute(self) -> Tensor:
        """Average gap over all runs of all ranks."""
        gaps = [average_gap(run, reference, self.names) for run, reference in self._pairs()]
        return torch.tensor(gaps, dtype=torch.float64).mean()


class TugOfWar(_OverRuns):
    """Tug of war, Π (1 − |Δ| / 100), over runs; 0…1, higher is better.

    Args:
        names: metrics to compare, in percent; with ``mia_confidence_svc`` for the forget accuracy it is ToW-MIA.
        over: ``runs`` averages the value of each run, ``means`` takes the value of the means over runs.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in 0…1.
    """

    higher_is_better = True

    def __init__(
        self, names: Sequence[str] = TUG_OF_WAR_METRICS, over: Literal["runs", "means"] = "runs", **kwargs: Any
    ) -> None:
        super().__init__(names, over, **kwargs)

    def compute(self) -> Tensor:
        """Tug of war over all runs of all ranks."""
        wars = [tug_of_war(run, reference, self.names) for run, reference in self._pairs()]
        return torch.tensor(wars, dtype=torch.float64).mean()


class RuntimeMeter:
    """A stopwatch with named laps, for the runtime efficiency RTE: seconds of unlearning alone.

    Laps with the same name add up; at most one runs at a time. Where a device is given, its pending kernels are
    awaited at each end, so that a lap holds the work that was started in it. Each rank measures itself.

    Args:
        device: the device that works, ``None`` for the CPU.

    Example:
        >>> meter = RuntimeMeter()
        >>> meter.start("fit")
        >>> meter.stop()
        'fit'
        >>> meter.seconds["fit"] < 1
        True
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._done: dict[str, float] = {}
        self._lap: str | None = None
        self._started = 0.0

    @property
    def running(self) -> str | None:
        """The name of the running lap, if any."""
        return self._lap

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each lap so far, the running one included."""
        laps = dict(self._done)
        if self._lap is not None:
            laps[self._lap] = laps.get(self._lap, 0.0) + time.perf_counter() - self._started
        return laps

    def start(self, lap: str) -> None:
        """End the running lap, if any, and begin (or continue) another."""
        self.stop()
        self._done.setdefault(lap, 0.0)
        self._lap, self._started = lap, self._now()

    def stop(self) -> str | None:
        """End the running lap and return its name; nothing happens when none runs."""
        lap = self._lap
        if lap is not None:
            self._done[lap] += self._now() - self._started
            self._lap = None
        return lap

    def load(self, seconds: Mapping[str, float]) -> None:
        """Continue from laps measured earlier, e.g. before a run was interrupted."""
        self.stop()
        self._done = {name: float(value) for name, value in seconds.items()}

    def _now(self) -> float:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
