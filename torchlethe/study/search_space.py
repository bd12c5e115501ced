"""What a search stage looks for: the key ``search`` of a study file, checked before anything runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchlethe._cli.errors import UsageError, suggest

KEYS = ("sampler", "trials", "metric", "direction", "space", "seed")
SAMPLERS = ("tpe", "random", "grid")
DIRECTIONS = ("minimize", "maximize")
RANGE = ("low", "high", "log", "int")
ON_TEST_DATA = ("test", "mia_", "average_gap", "tug_of_war")
NOT_THE_TRIAL = ("train_", "original_", "reference_")


@dataclass(frozen=True)
class Search:
    """What a search stage looks for.

    Attributes:
        metric: as a trial leaves it in ``metrics.json`` or ``evaluation.json``.
        direction: ``minimize`` or ``maximize``.
        space: by dotted key, a list of values, or a range with ``low``, ``high``, ``log`` and ``int``.
        trials: how many.
        sampler: ``tpe``, ``random`` or ``grid``.
        seed: of the sampler; None for the seed of the run.
    """

    metric: str
    direction: Literal["minimize", "maximize"]
    space: Mapping[str, Any]
    trials: int
    sampler: str = "tpe"
    seed: int | None = None

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Every combination of a space of lists; the last key varies fastest."""
        return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*self.space.values())]


def parse_search(
    value: Mapping[str, Any], where: str = "search", path: str = "", command: str = "fit", method: str | None = None
) -> Search:
    """Check the ``search`` of a stage.

    Args:
        value: as it is in the study file.
        where: its key, for messages.
        path: of the study file, for messages.
        command: of the stage.
        method: of the stage.

    Raises:
        UsageError: one sentence; a metric or a command that looks at test data is refused.

    Example:
        >>> space = {"model.init_args.alpha": [1, 3]}
        >>> found = parse_search({"sampler": "grid", "metric": "val_loss", "space": space})
        >>> found.trials, found.direction
        (2, 'minimize')
        >>> parse_search({"metric": "test_loss", "space": space})
        Traceback (most recent call last):
        torchlethe._cli.errors.UsageError: 'search.metric' is 'test_loss', which is measured on test data; ...
    """

    def wrong(key: str, text: str) -> UsageError:
        return UsageError(f"{path}{': ' if path else ''}'{where}{'.' if key else ''}{key}' {text}")

    for key in value:
        if key not in KEYS:
            raise wrong("", f"has the unknown key '{key}'{suggest(str(key), KEYS)}")
    if command not in ("fit", "validate"):
        raise wrong("", f"stands in a stage with the command '{command}', but a search needs fit or validate")
    if method is not None:
        raise wrong("", f"stands in the stage of the method '{method}'; a method's stage uses the result of a search")
    metric = value.get("metric")
    if not isinstance(metric, str) or not metric:
        raise wrong("metric", f"is {metric!r}, expected a metric of validation data such as 'val_loss'")
    if reason := _not_on_validation_data(metric):
        raise wrong("metric", f"is '{metric}', which {reason}; choose by validation data, as with 'val_loss'")
    known = {"loss": "minimize", "accuracy": "maximize"}
    direction = value.get("direction", next((known[end] for end in known if metric.endswith(end)), None))
    sampler = value.get("sampler", "tpe")
    if direction is None:
        raise wrong("direction", f"is missing, and the name '{metric}' does not tell it; give minimize or maximize")
    for key, given, allowed in (("direction", direction, DIRECTIONS), ("sampler", sampler, SAMPLERS)):
        if given not in allowed:
            raise wrong(key, f"is {given!r}, allowed are {', '.join(allowed)}")
    space = value.get("space")
    if not isinstance(space, dict) or not space:
        raise wrong("space", f"is {space!r}, expected dotted keys with lists or ranges of values")
    for key, values in space.items():
        if reason := _unusable(str(key), values, sampler):
            raise wrong(f"space.{key}", reason)
    points = math.prod(len(values) for values in space.values()) if sampler == "grid" else None
    trials, seed = value.get("trials", points), value.get("seed")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise wrong("trials", f"is {trials!r}, expected how many trials to run, at least 1")
    if points not in (None, trials):
        raise wrong("trials", f"is {trials}, but the grid has {points} points; leave it out")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise wrong("seed", f"is {seed!r}, expected a whole number")
    return Search(metric, direction, space, trials, sampler, seed)


def _not_on_validation_data(metric: str) -> str:
    if metric.removeprefix("original_").removeprefix("reference_").startswith(ON_TEST_DATA):
        return "is measured on test data"
    if metric.startswith("train_"):
        return "is measured on training data"
    return "belongs to another model" if metric.startswith(NOT_THE_TRIAL) else ""


def _unusable(key: str, values: Any, sampler: str) -> str:
    """What is wrong with one entry of the space; empty when nothing is."""
    from torchlethe.study.spec import FIXED, references

    if key.startswith(FIXED):
        return "cannot be searched, as a study decides where its runs write"
    if references(values):
        return "has a reference, which only 'set' may have"
    if isinstance(values, list) and values:
        names = [json.dumps(value, sort_keys=True, default=str) for value in values]
        return f"is {values!r}, which has a value twice" if len(set(names)) < len(names) else ""
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= set(RANGE):
        return f"is {values!r}, expected a list of values or {{low: …, high: …, log: …, int: …}}"
    if sampler == "grid":
        return "is a range, but a grid needs a list of values"
    low, high, whole, log = (values.get(name, False) for name in ("low", "high", "int", "log"))
    kinds: Any = int if whole else int | float
    if not all(isinstance(end, kinds) and not isinstance(end, bool) for end in (low, high)):
        hint = "whole numbers" if whole else "numbers (in YAML 1.0e-3: 1e-3 is text)"
        return f"has low {low!r} and high {high!r}, expected {hint}"
    if not low < high or (log and low <= 0):
        rule = "0 < low < high for a logarithmic range" if log else "low < high"
        return f"has low {low} and high {high}, expected {rule}"
    return ""
