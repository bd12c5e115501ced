"""From a checked study to jobs: folders and exact command lines."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchlethe.study.fingerprints import load_yaml
from torchlethe.study.keys import identify
from torchlethe.study.spec import OUTPUTS, REFERENCE, Layer, Scenario, Stage, Study

# A stage has its own log file and folder; what follows may be set again by the study.
QUIET = {
    "trainer.logger": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


@dataclass(frozen=True)
class Job:
    """One LightningCLI call of a study.

    Attributes:
        stage: the stage it belongs to, one point of its grid.
        scenario: None for a stage that does not run per scenario.
        seed: None for a stage that does not run per seed.
        folder: where everything it writes goes.
        words: the command line after ``lethe COMMAND``.
        inputs: files of other jobs that it reads, by the reference that names them.
        needs: the jobs that must be done before.
        files: its configuration files, which come first among the words.
        template: the other words, with references to outputs of other stages as the study has them.
    """

    stage: Stage
    scenario: Scenario | None
    seed: int | None
    folder: Path
    words: tuple[str, ...]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    needs: tuple[Job, ...] = ()
    files: tuple[Path, ...] = ()
    template: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """A short name for people: ``sfron (alpha=3) · one class · seed 0``."""
        name = f"{self.stage.base} ({self.stage.point})" if self.stage.point else self.stage.base
        scenario = self.scenario.title if self.scenario else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return " · ".join(part for part in (name, scenario, seed) if part)

    @property
    def command(self) -> str:
        """The line that reproduces the job in a shell."""
        return shlex.join(["lethe", self.stage.command, *self.words])

    def key(self) -> str:
        """What the result depends on, as a SHA-256; see :func:`torchlethe.study.keys.identify`."""
        return identify(self).key

    def trainer(self, option: str) -> Any:
        """What the job sets an option of the Trainer to, in its files or words; None where it does not."""
        value = None
        for path in self.files:
            content = load_yaml(path) if path.is_file() else None
            trainer = content.get("trainer") if isinstance(content, dict) else None
            value = trainer.get(option, value) if isinstance(trainer, dict) else value
        for word in self.words:
            if word.startswith(f"--trainer.{option}="):
                value = yaml.safe_load(word.partition("=")[2])
        return value


def plan_jobs(study: Study, output: str | Path | None = None) -> list[Job]:
    """List the jobs of a study in an order in which they can run.

    Args:
        study: the checked study.
        output: folder for all results instead of the study's own.

    Returns:
        All jobs, each after those that it needs: stage by stage, then by scenario, then by seed.
    """
    root = Path(output) if output is not None else study.output
    jobs: dict[tuple[str, str | None, int | None], Job] = {}
    for stage in study.stages.values():
        scenarios: list[Scenario | None] = [None]
        if "scenario" in stage.per:
            scenarios = [scenario for name, scenario in study.scenarios.items() if stage.runs_in(name)]
        for scenario in scenarios:
            for seed in study.seeds if "seed" in stage.per else [None]:
                needed = {}
                for name in stage.needs:
                    per = study.stages[name].per
                    point = (scenario.name if scenario and "scenario" in per else None, seed if "seed" in per else None)
                    needed[study.stages[name].base] = jobs[name, *point]
                job = _job(study, stage, scenario, seed, root, needed)
                jobs[stage.name, scenario.name if scenario else None, seed] = job
    return list(jobs.values())


def _job(
    study: Study, stage: Stage, scenario: Scenario | None, seed: int | None, root: Path, needed: Mapping[str, Job]
) -> Job:
    folder = root / stage.name
    if scenario:
        folder /= scenario.name
    if seed is not None:
        folder /= f"seed-{seed}"
    layer = Layer(set=QUIET) + study.defaults
    if scenario:
        layer += scenario.layer
    layer += stage.layer
    if scenario:
        layer += scenario.stages.get(stage.base, Layer())
    layer += Layer(set=stage.grid)

    own: dict[str, Any] = {"seed": seed, "scenario": scenario.name if scenario else None}
    outputs = {
        f"{name}.{kind}": need.folder if file == "." else need.folder / file
        for name, need in needed.items()
        for kind, file in OUTPUTS.items()
    }
    inputs: dict[str, Path] = {}
    files = []
    for path in dict.fromkeys(layer.config):
        if (reference := REFERENCE.fullmatch(str(path))) is not None:
            inputs[reference[1]] = path = outputs[reference[1]]
        files.append(_relative(path))
    words, template = [], []
    for key, value in layer.set.items():
        for reference in REFERENCE.findall(json.dumps(value)):
            if reference in outputs and OUTPUTS[reference.partition(".")[2]] != ".":
                inputs[reference] = outputs[reference]
        option = key.rstrip("+") + ("+" if key.endswith("+") else "")
        words.append(f"--{option}={_text(_resolved(value, own | {k: str(v) for k, v in outputs.items()}))}")
        template.append(f"--{option}={_text(_resolved(value, own))}")
    inputs = {name: _relative(path) if _relative(path) in files else path for name, path in inputs.items()}
    return Job(
        stage,
        scenario,
        seed,
        folder,
        (*(f"--config={path}" for path in files), f"--trainer.default_root_dir={folder}", *words),
        inputs,
        tuple(needed.values()),
        tuple(files),
        tuple(template),
    )


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    """Replace every ``${…}`` that is known; a value that is nothing but one reference keeps its type."""
    if isinstance(value, str):
        if (whole := REFERENCE.fullmatch(value)) is not None:
            return values.get(whole[1], value)
        return REFERENCE.sub(lambda match: str(values.get(match[1], match[0])), value)
    if isinstance(value, Mapping):
        return {key: _resolved(item, values) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(item, values) for item in value]
    return value


def _text(value: Any) -> str:
    """A value as LightningCLI reads it back."""
    return value if isinstance(value, str) else json.dumps(value)


def _relative(path: Path) -> Path:
    """A path below the working directory without its front part, so that commands and reports carry over."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative
