"""Reading the study file: what it may say, and the sentence it gets when it says something else.

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
for each entry of ``set``. Later layers win: defaults, scenario, stage, the scenario's own ``stages.<name>``, and the
point of the stage's ``grid``, see :mod:`~torchlethe.study.grids`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from torchlethe._cli.errors import UsageError, suggest
from torchlethe.study.grids import expand
from torchlethe.study.search_space import parse_search
from torchlethe.study.spec import FIXED, OUTPUTS, REFERENCE, Layer, Scenario, Stage, Study, references

KEYS = (
    "name",
    "description",
    "output",
    "seeds",
    "reference",
    "original",
    "metrics",
    "slurm",
    "defaults",
    "scenarios",
    "stages",
)
AXES = ("scenario", "seed")
COMMANDS = ("fit", "validate", "test", "predict")
STAGE_KEYS = ("command", "method", "needs", "per", "scenarios", "config", "set", "grid", "search", "note")
WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


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
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a folder; name the study file in it, such as {path / 'study.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"the study file '{path}' cannot be read: {reason}") from None
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
    stages = {name: reader.stage(name, value, raw_stages, scenarios) for name, value in raw_stages.items()}
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
        if top.get(key) is not None and stages[top[key]].scenarios:
            raise UsageError(f"{path}: 'stages.{top[key]}.scenarios' leaves some out, but '{key}' is needed in each")
    metrics = top.get("metrics") or ()
    place = path.resolve()
    default = (place.parent.name if path.stem == "study" else "") or path.stem
    study = Study(
        path=path,
        name=str(top.get("name") or default),
        description=" ".join(str(top.get("description") or "").split()),
        output=Path(top.get("output") or Path("runs") / default),
        seeds=tuple(seeds),
        scenarios=scenarios,
        stages=reader.ordered(stages, tuple(scenarios)),
        reference=top.get("reference"),
        original=top.get("original"),
        metrics=tuple(reader.strings(metrics, "metrics")),
        defaults=reader.layer(reader.mapping(top.get("defaults") or {}, "defaults", ("config", "set")), "defaults"),
        slurm=reader.mapping(top.get("slurm") or {}, "slurm", None),
    )
    reader.check_references(study)
    return replace(study, stages=expand(study.stages, path, (study.reference, study.original)))


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
            if (reference := REFERENCE.fullmatch(name)) is not None and reference[1].endswith(".best"):
                files.append(Path(name))
                continue
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

    def stage(self, name: str, value: Any, stages: Mapping[str, Any], scenarios: Iterable[str]) -> Stage:
        """One entry of ``stages``."""
        where = f"stages.{name}"
        value = self.mapping(value or {}, where, STAGE_KEYS)
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
        referred = [word.split(".")[0] for word in references(layer) if "." in word]
        needs = dict.fromkeys([*self.strings(value.get("needs") or (), f"{where}.needs"), *referred])
        for need in needs:
            if need not in stages:
                raise UsageError(f"{self.path}: '{where}' needs '{need}', which is no stage{suggest(need, stages)}")
        note = " ".join(str(value.get("note") or "").split())
        grid = self.grid(value.get("grid") or {}, f"{where}.grid")
        search = value.get("search")
        if search is not None and not isinstance(search, dict):
            raise UsageError(f"{self.path}: '{where}.search' is {search!r}, expected keys with values")
        if search is not None:
            parse_search(search, f"{where}.search", str(self.path), command, method)
        only = self.only(value.get("scenarios"), f"{where}.scenarios", per, tuple(scenarios))
        return Stage(name, command, method, tuple(needs), per, layer, note, grid, search, name, scenarios=only)

    def only(self, value: Any, where: str, per: Sequence[str], scenarios: Sequence[str]) -> tuple[str, ...]:
        """The scenarios that a stage is restricted to; none named, none left out."""
        names = self.strings(value if value is not None else (), where)
        if value is not None and ("scenario" not in per or not names):
            rule = "such a stage runs per scenario, in at least one"
            raise UsageError(f"{self.path}: '{where}' is {value!r}, but {rule}")
        for name in names:
            if name not in scenarios:
                raise UsageError(
                    f"{self.path}: '{where}' names '{name}', which is no scenario{suggest(name, scenarios)}"
                )
        return tuple(names)

    def grid(self, value: Any, where: str) -> dict[str, list[Any]]:
        """A list of values for each dotted key."""
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UsageError(f"{self.path}: '{where}' is {value!r}, expected dotted keys with lists of values")
        for key, values in value.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"{self.path}: '{where}.{key}' is {values!r}, expected a list of at least one value")
            if key.startswith(FIXED):
                raise UsageError(f"{self.path}: '{where}' has '{key}', but a study decides where its runs write")
            if references(values):
                raise UsageError(f"{self.path}: '{where}.{key}' has a reference, which only 'set' may have")
        return value

    def ordered(self, stages: dict[str, Stage], scenarios: Iterable[str]) -> dict[str, Stage]:
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
                if lacking := [name for name in stage.scenarios or scenarios if not done[need].runs_in(name)]:
                    raise UsageError(
                        f"{self.path}: 'stages.{stage.name}' runs in the scenario '{lacking[0]}', but needs '{need}', "
                        "which does not"
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
                for word in references(layer):
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
            outputs = {need: [k for k in OUTPUTS if k != "best" or study.stages[need].search] for need in study.stages}
            options = ["seed", "scenario", *(f"{need}.{kind}" for need, kinds in outputs.items() for kind in kinds)]
            raise UsageError(f"{self.path}: unknown reference ${{{word}}} in '{where}'{suggest(word, options)}")
        if output == "best" and study.stages[name].search is None:
            raise UsageError(f"{self.path}: '{where}' uses ${{{word}}}, but the stage '{name}' is no search")
        if name not in stage.needs:
            use = f"'{where}' uses ${{{word}}}"
            raise UsageError(f"{self.path}: {use}, so the stage '{stage.name}' must list '{name}' in its 'needs'")
