"""The study file: what it may say, and the sentence it gets when it says something else.

A study is a YAML file::

    name: Forgetting digits
    seeds: [0, 1, 2]
    reference: retrain                  # the stage that every gap is measured against
    original: original_judged           # the stage that evaluates the model before unlearning
    defaults:
      config: [common.yaml]             # relative to the study file
      set: {seed_everything: "${seed}"}
    scenarios:                          # the axis of forget requests
      one class:
        set: {data.init_args.forget.init_args.classes: [3]}
    stages:
      original:
        per: [seed]                     # trained once per seed, shared by all scenarios
        config: [train.yaml]
      original_judged:
        command: test
        method: Original                # a row of the table
        config: [evaluate.yaml]
        set: {model.init_args.weights: "${original.weights}"}
      retrain:
        method: Retrain
        config: [retrain.yaml]
      sfron:
        method: SFRon
        config: [sfron.yaml]
        set: {model.init_args.weights: "${original.weights}"}

Every stage is one LightningCLI call: ``command`` (``fit`` by default), ``--config`` for each file and ``--key=value``
for each entry of ``set``. Later layers win: defaults, scenario, stage, the scenario's own ``stages.<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchlethe._cli.errors import UsageError, suggest

KEYS = (
    "name",
    "description",
    "output",
    "seeds",
    "reference",
    "original",
    "metrics",
    "defaults",
    "scenarios",
    "stages",
)
AXES = ("scenario", "seed")
COMMANDS = ("fit", "validate", "test", "predict")
REFERENCE = re.compile(r"\$\{([^}]*)\}")
WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
FIXED = ("trainer.logger", "trainer.default_root_dir")
OUTPUTS = {"weights": "weights.safetensors", "folder": "."}


@dataclass(frozen=True)
class Layer:
    """Configuration files and single settings, in the order in which they count.

    Attributes:
        config: YAML files for LightningCLI.
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
    """One node of the graph: a LightningCLI call per point of its axes.

    Attributes:
        name: as in folder names and references.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        method: the row of the table that its evaluation fills; None for a stage that only prepares others.
        needs: the stages that must be done before, those it refers to included.
        per: the axes it runs along, out of ``scenario`` and ``seed``.
        layer: its own configuration.
        note: a sentence for the report.
    """

    name: str
    command: str
    method: str | None
    needs: tuple[str, ...]
    per: tuple[str, ...]
    layer: Layer
    note: str = ""


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

    @property
    def methods(self) -> dict[str, Stage]:
        """The stages that fill a row, by row title, in the file's order."""
        return {stage.method: stage for stage in self.stages.values() if stage.method}


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Args:
        path: the YAML file.

    Raises:
        UsageError: one sentence that names the key, its value and what is allowed.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no study file '{path}' (lethe list configs shows the shipped ones)") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    reader = _Reader(path)
    top = reader.mapping(content, "", KEYS)
    if not top.get("stages"):
        raise UsageError(f"{path}: 'stages' is missing; a study has at least one stage")
    seeds = top.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UsageError(f"{path}: 'seeds' is {seeds!r}, allowed is a list of integers of at least 0")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{path}: 'seeds' is {seeds!r}, each seed counts once")
    raw_stages = reader.mapping(top["stages"], "stages", None)
    scenarios = {
        name: reader.scenario(name, value, raw_stages)
        for name, value in reader.mapping(top.get("scenarios") or {"all": {}}, "scenarios", None).items()
    }
    stages = {name: reader.stage(name, value, raw_stages) for name, value in raw_stages.items()}
    titles = [stage.method for stage in stages.values() if stage.method]
    for title in titles:
        if titles.count(title) > 1:
            raise UsageError(f"{path}: two stages fill the row '{title}'; give each its own 'method'")
    rows = [name for name, stage in stages.items() if stage.method]
    for key in ("reference", "original"):
        if top.get(key) is not None and top[key] not in rows:
            raise UsageError(
                f"{path}: '{key}' is {top[key]!r}, but must be a stage with a 'method'{suggest(str(top[key]), rows)}"
            )
    metrics = top.get("metrics") or ()
    study = Study(
        path=path,
        name=str(top.get("name") or path.stem),
        description=" ".join(str(top.get("description") or "").split()),
        output=Path(top.get("output") or Path("runs") / path.parent.name),
        seeds=tuple(seeds),
        scenarios=scenarios,
        stages=reader.ordered(stages),
        reference=top.get("reference"),
        original=top.get("original"),
        metrics=tuple(reader.strings(metrics, "metrics")),
        defaults=reader.layer(reader.mapping(top.get("defaults") or {}, "defaults", ("config", "set")), "defaults"),
    )
    reader.check_references(study)
    return study


class _Reader:
    """Turns YAML values into the dataclasses above; remembers the file for its messages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mapping(self, value: Any, where: str, allowed: Iterable[str] | None) -> dict[str, Any]:
        """A mapping with names as keys, out of the allowed ones."""
        label = f"'{where}'" if where else "the file"
        if not isinstance(value, dict):
            raise UsageError(f"{self.path}: {label} is {value!r}, expected keys with values")
        for key in value:
            if allowed is None and not (isinstance(key, str) and WORD.fullmatch(key)):
                rule = "a name has letters, digits, '_' and '-' (text goes into 'title')"
                raise UsageError(f"{self.path}: {key!r} in {label} is no name; {rule}")
            if allowed is not None and key not in allowed:
                options = tuple(allowed)
                raise UsageError(f"{self.path}: unknown key '{key}' in {label}{suggest(str(key), options)}")
        return value

    def strings(self, value: Any, where: str) -> list[str]:
        """A list of strings; a single one may stand alone."""
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, Sequence) or not all(isinstance(item, str) for item in values):
            raise UsageError(f"{self.path}: '{where}' is {value!r}, expected a list of names")
        return list(values)

    def layer(self, value: Mapping[str, Any], where: str) -> Layer:
        """The ``config`` and ``set`` of one layer; files must exist."""
        files = []
        for name in self.strings(value.get("config") or (), f"{where}.config"):
            file = self.path.parent / name
            if not file.is_file():
                raise UsageError(f"{self.path}: '{where}.config' names '{name}', but there is no file '{file}'")
            files.append(file)
        settings = value.get("set") or {}
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise UsageError(f"{self.path}: '{where}.set' is {settings!r}, expected dotted keys with values")
        for key in settings:
            if key.startswith(FIXED):
                raise UsageError(f"{self.path}: '{where}.set' has '{key}', but a study decides where its runs write")
        return Layer(tuple(files), settings)

    def scenario(self, name: str, value: Any, stages: Mapping[str, Any]) -> Scenario:
        """One entry of ``scenarios``."""
        where = f"scenarios.{name}"
        value = self.mapping(value or {}, where, ("title", "config", "set", "stages"))
        special = self.mapping(value.get("stages") or {}, f"{where}.stages", tuple(stages))
        layers = {}
        for stage, settings in special.items():
            inner = f"{where}.stages.{stage}"
            layers[stage] = self.layer(self.mapping(settings or {}, inner, ("config", "set")), inner)
        return Scenario(name, str(value.get("title") or name.replace("_", " ")), self.layer(value, where), layers)

    def stage(self, name: str, value: Any, stages: Mapping[str, Any]) -> Stage:
        """One entry of ``stages``."""
        where = f"stages.{name}"
        keys = ("command", "method", "needs", "per", "config", "set", "note")
        value = self.mapping(value or {}, where, keys)
        command = value.get("command", "fit")
        if command not in COMMANDS:
            raise UsageError(f"{self.path}: '{where}.command' is {command!r}, allowed are {', '.join(COMMANDS)}")
        per = tuple(self.strings(value.get("per", AXES), f"{where}.per"))
        for axis in per:
            if axis not in AXES:
                raise UsageError(f"{self.path}: '{where}.per' names '{axis}', allowed are {' and '.join(AXES)}")
        method = value.get("method")
        if method and set(per) != set(AXES):
            raise UsageError(
                f"{self.path}: '{where}' has a 'method', so its 'per' must be [scenario, seed], not {list(per)}"
            )
        layer = self.layer(value, where)
        referred = [word.split(".")[0] for word in references(layer.set) if "." in word]
        needs = dict.fromkeys([*self.strings(value.get("needs") or (), f"{where}.needs"), *referred])
        for need in needs:
            if need not in stages:
                raise UsageError(f"{self.path}: '{where}' needs '{need}', which is no stage{suggest(need, stages)}")
        return Stage(name, command, method, tuple(needs), per, layer, " ".join(str(value.get("note") or "").split()))

    def ordered(self, stages: dict[str, Stage]) -> dict[str, Stage]:
        """Every stage after what it needs, otherwise in the file's order."""
        done: dict[str, Stage] = {}
        waiting = dict(stages)
        while waiting:
            ready = next((name for name, stage in waiting.items() if all(need in done for need in stage.needs)), None)
            if ready is None:
                raise UsageError(f"{self.path}: the stages {', '.join(waiting)} need each other in a circle")
            done[ready] = waiting.pop(ready)
        for stage in done.values():
            for need in stage.needs:
                if missing := [axis for axis in done[need].per if axis not in stage.per]:
                    raise UsageError(
                        f"{self.path}: 'stages.{stage.name}' runs per {' and '.join(stage.per) or 'study'}, but needs "
                        f"'{need}', which also runs per {' and '.join(missing)}"
                    )
        return done

    def check_references(self, study: Study) -> None:
        """Every ``${…}`` names something that exists for the stage that uses it."""
        for stage in study.stages.values():
            layers = [("defaults", study.defaults), (f"stages.{stage.name}", stage.layer)]
            if "scenario" in stage.per:
                for scenario in study.scenarios.values():
                    layers.append((f"scenarios.{scenario.name}", scenario.layer))
                    inner = f"scenarios.{scenario.name}.stages.{stage.name}"
                    layers.append((inner, scenario.stages.get(stage.name, Layer())))
            for where, layer in layers:
                for word in references(layer.set):
                    self._check_reference(word, where, stage, study)

    def _check_reference(self, word: str, where: str, stage: Stage, study: Study) -> None:
        name, _, output = word.partition(".")
        if not output and name in ("seed", "scenario"):
            if name not in stage.per:
                raise UsageError(
                    f"{self.path}: '{where}' uses ${{{word}}}, but the stage '{stage.name}' does not run per {name}"
                )
            return
        if name not in study.stages or output not in OUTPUTS:
            options = ["seed", "scenario", *(f"{need}.{kind}" for need in study.stages for kind in OUTPUTS)]
            raise UsageError(f"{self.path}: unknown reference ${{{word}}} in '{where}'{suggest(word, options)}")
        if name not in stage.needs:
            use = f"'{where}' uses ${{{word}}}"
            raise UsageError(f"{self.path}: {use}, so the stage '{stage.name}' must list '{name}' in its 'needs'")


def references(value: Any) -> list[str]:
    """The words inside every ``${…}`` of a nested value.

    Example:
        >>> references({"a": ["${seed}"], "b": "x/${original.weights}"})
        ['seed', 'original.weights']
    """
    if isinstance(value, str):
        return REFERENCE.findall(value)
    if isinstance(value, Mapping):
        return [word for item in value.values() for word in references(item)]
    if isinstance(value, list | tuple):
        return [word for item in value for word in references(item)]
    return []
