"""Grids: a stage with several values for some settings becomes one stage for each combination of them.

A stage that needs a stage with a grid runs for each of its points too, together with its own grid, so that a recipe can
be varied at its root and every method compared on each variant.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchlethe._cli.errors import UsageError
from torchlethe.study.spec import Stage

Axis = tuple[str, str]  # the stage that has the grid, and the setting
LIMIT = 32  # characters of a value in a name


def expand(stages: Mapping[str, Stage], path: Path, single: Sequence[str | None] = ()) -> dict[str, Stage]:
    """Replace every stage by one for each point of the grids that it has or inherits.

    Args:
        stages: by name, each after those that it needs; their ``grid`` has lists of values.
        path: of the study file, for messages.
        single: names of stages that must have one row.

    Returns:
        The stages by their full names; their ``grid`` has the values of one point, their ``needs`` full names.
    """
    axes: dict[str, dict[Axis, list[Any]]] = {}
    found: dict[str, Stage] = {}
    names: dict[tuple[str, str], str] = {}
    for stage in stages.values():
        own = {(stage.name, key): values for key, values in stage.grid.items()}
        axes[stage.name] = {axis: values for need in stage.needs for axis, values in axes[need].items()} | own
        if stage.name in single and axes[stage.name]:
            raise UsageError(
                f"{path}: 'stages.{stage.name}' has or inherits a grid, but what others are compared with is one row"
            )
        labels = _labels(axes[stage.name], path, stage.name)
        for values in itertools.product(*axes[stage.name].values()):
            point = dict(zip(axes[stage.name], values, strict=True))
            words = ", ".join(f"{labels[axis]}={_text(value)}" for axis, value in point.items())
            folder = ",".join(f"{labels[axis]}={_name(value)}" for axis, value in point.items())
            name = f"{stage.name}/{folder}" if folder else stage.name
            names[stage.name, _key(point)] = name
            needs = [names[need, _key({axis: point[axis] for axis in axes[need]})] for need in stage.needs]
            found[name] = replace(
                stage,
                name=name,
                method=f"{stage.method} ({words})" if stage.method and words else stage.method,
                needs=tuple(needs),
                grid={key: value for (owner, key), value in point.items() if owner == stage.name},
                point=words,
            )
    return found


def _labels(axes: Mapping[Axis, list[Any]], path: Path, stage: str) -> dict[Axis, str]:
    """A short name for each axis: the last part of its key, with as much in front of it as tells two axes apart."""
    labels = {}
    last = Counter(_last(key) for _, key in axes)
    whole = Counter(key for _, key in axes)
    for owner, key in axes:
        label = _last(key) if last[_last(key)] == 1 else key if whole[key] == 1 else f"{owner}.{key}"
        labels[owner, key] = label
    for (owner, key), values in axes.items():
        shown = [_name(value) for value in values]
        for value in shown:
            if shown.count(value) > 1:
                raise UsageError(f"{path}: 'stages.{owner}.grid.{key}' has the value {value} twice")
    return labels


def _last(key: str) -> str:
    return key.rstrip("+").rsplit(".", 1)[-1]


def _key(point: Mapping[Axis, Any]) -> str:
    return json.dumps([[*axis, value] for axis, value in sorted(point.items())], default=str)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LIMIT else f"{text[: LIMIT - 1]}…"


def _name(value: Any) -> str:
    """A value in a folder's name: a hash tells apart what such a name cannot hold."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    plain = re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip("-.")
    if plain != text or len(plain) > LIMIT:
        plain = f"{plain[:LIMIT]}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return plain
