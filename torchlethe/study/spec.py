"""What a study is: layers of configuration, scenarios, stages; see :mod:`~torchlethe.study.reader` for the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFERENCE = re.compile(r"\$\{([^}]*)\}")
FIXED = ("trainer.logger", "trainer.default_root_dir")
OUTPUTS = {"weights": "weights.safetensors", "best": "best.yaml", "folder": "."}


@dataclass(frozen=True)
class Layer:
    """Configuration files and single settings, in the order in which they count.

    Attributes:
        config: YAML files for LightningCLI, or a reference ``${stage.best}``.
        set: dotted keys and their values; a key that ends in ``+`` appends to a list.
    """

    config: tuple[Path, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Layer) -> Layer:
        # appending keys are kept apart by layer, so that each layer may append its own
        repeated = {key for key in other.set if key in self.set and not key.endswith("+")}
        kept = {key: value for key, value in self.set.items() if key not in repeated}
        for key, value in other.set.items():
            while key in kept:
                key += "+"
            kept[key] = value
        return Layer(self.config + other.config, kept)


@dataclass(frozen=True)
class Scenario:
    """One forget request (or data set, or anything else that all methods are compared on).

    Attributes:
        name: as in folder names.
        title: as in the report.
        layer: what it changes for every stage that runs per scenario.
        stages: what it changes for single stages, by stage name.
    """

    name: str
    title: str
    layer: Layer
    stages: Mapping[str, Layer]


@dataclass(frozen=True)
class Stage:
    """One node of the graph: a LightningCLI call per scenario and seed; a stage with a grid is one node per point.

    Attributes:
        name: as in folder names; with the point of the grid, such as ``sfron/alpha=3``.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        method: the row of the table that its evaluation fills; None for a stage that only prepares others.
        needs: the stages that must be done before, those it refers to included.
        per: the axes it runs along, out of ``scenario`` and ``seed``.
        layer: its own configuration.
        note: a sentence for the report.
        grid: in the file, the values of each setting; in a checked study, the values of one point.
        search: what a search stage looks for, as it is in the file; None for other stages.
        base: the name in the file, as in references.
        point: the point of the grid in words, such as ``alpha=3``; empty without a grid.
        scenarios: names of the scenarios that it runs in; empty for all.
    """

    name: str
    command: str
    method: str | None
    needs: tuple[str, ...]
    per: tuple[str, ...]
    layer: Layer
    note: str = ""
    grid: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] | None = None
    base: str = ""
    point: str = ""
    scenarios: tuple[str, ...] = ()

    def runs_in(self, scenario: str) -> bool:
        """Whether it runs in a scenario; a stage that does not run per scenario serves all of them."""
        return "scenario" not in self.per or not self.scenarios or scenario in self.scenarios


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        path: the file it was read from.
        name: title of the report.
        description: a paragraph below the title.
        output: folder of all results, relative to the working directory unless absolute.
        seeds: one run per seed.
        scenarios: by name, in the file's order.
        stages: in an order in which every stage comes after what it needs.
        reference: the stage that gaps and speed-ups are measured against.
        original: the stage that evaluates the model before unlearning.
        metrics: the metrics to show first, as keys of ``evaluation.json``; empty for the usual ones.
        defaults: the layer below every stage.
        slurm: parameters of the cluster's jobs, as submitit names them.
    """

    path: Path
    name: str
    description: str
    output: Path
    seeds: tuple[int, ...]
    scenarios: Mapping[str, Scenario]
    stages: Mapping[str, Stage]
    reference: str | None
    original: str | None
    metrics: tuple[str, ...]
    defaults: Layer
    slurm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Stage]:
        """The stages that fill a row, by row title, in the file's order."""
        return {stage.method: stage for stage in self.stages.values() if stage.method}


def references(value: Any) -> list[str]:
    """The words inside every ``${…}`` of a nested value.

    Example:
        >>> references({"a": ["${seed}"], "b": "x/${original.weights}"})
        ['seed', 'original.weights']
    """
    if isinstance(value, str):
        return REFERENCE.findall(value)
    if isinstance(value, Layer):
        return references([*map(str, value.config), value.set])
    if isinstance(value, Mapping):
        return [word for item in value.values() for word in references(item)]
    if isinstance(value, list | tuple):
        return [word for item in value for word in references(item)]
    return []
