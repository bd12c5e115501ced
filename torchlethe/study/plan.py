"""From a checked study to jobs: folders, exact command lines, and keys that say whether a result still counts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchlethe import __version__
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
        stage: the stage it belongs to.
        scenario: None for a stage that does not run per scenario.
        seed: None for a stage that does not run per seed.
        folder: where everything it writes goes.
        words: the command line after ``lethe COMMAND``.
        inputs: files of other jobs that it reads, by the reference that names them.
        needs: the jobs that must be done before.
    """

    stage: Stage
    scenario: Scenario | None
    seed: int | None
    folder: Path
    words: tuple[str, ...]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    needs: tuple[Job, ...] = ()

    @property
    def title(self) -> str:
        """A short name for people: ``sfron · one class · seed 0``."""
        scenario = self.scenario.title if self.scenario else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return " · ".join(part for part in (self.stage.name, scenario, seed) if part)

    @property
    def command(self) -> str:
        """The line that reproduces the job in a shell."""
        return shlex.join(["lethe", self.stage.command, *self.words])

    def key(self) -> str:
        """What the result depends on, as a SHA-256: command line, content of config files and inputs, version of Lethe.

        Paths of the study's own folder do not count, so a moved output folder is still done. The inputs must exist.
        """
        digest = hashlib.sha256(f"{__version__}\n{self.stage.command}\n".encode())
        text = "\n".join(word for word in self.words if not word.startswith("--config="))
        for reference, path in self.inputs.items():
            text = text.replace(str(path), f"${{{reference}}}")
        digest.update(text.replace(str(self.folder), "${folder}").encode())
        for word in self.words:
            if word.startswith("--config="):
                digest.update(config_content(Path(word.removeprefix("--config="))))
        for reference, path in sorted(self.inputs.items()):
            digest.update(reference.encode())
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def config_content(path: Path, seen: frozenset[Path] = frozenset()) -> bytes:
    """The content of a configuration file and of the YAML files that it refers to."""
    content = path.read_bytes()
    for value in _strings(yaml.safe_load(content)):
        inner = path.parent / value
        if value.endswith((".yaml", ".yml", ".json")) and inner.is_file() and inner not in seen:
            content += config_content(inner, seen | {path, inner})
    return content


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _strings(item)]


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
        scenarios = list(study.scenarios.values()) if "scenario" in stage.per else [None]
        for scenario in scenarios:
            for seed in study.seeds if "seed" in stage.per else [None]:
                needed = {}
                for name in stage.needs:
                    per = study.stages[name].per
                    point = (scenario.name if scenario and "scenario" in per else None, seed if "seed" in per else None)
                    needed[name] = jobs[name, *point]
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
    layer = Layer(set={"trainer.default_root_dir": str(folder), **QUIET}) + study.defaults
    if scenario:
        layer += scenario.layer
    layer += stage.layer
    if scenario:
        layer += scenario.stages.get(stage.name, Layer())

    values: dict[str, Any] = {"seed": seed, "scenario": scenario.name if scenario else None}
    inputs: dict[str, Path] = {}
    for name, need in needed.items():
        for kind, file in OUTPUTS.items():
            values[f"{name}.{kind}"] = str(need.folder / file) if file != "." else str(need.folder)
    words = [f"--config={_relative(path)}" for path in dict.fromkeys(layer.config)]
    for key, value in layer.set.items():
        for reference in REFERENCE.findall(json.dumps(value)):
            name, _, kind = reference.partition(".")
            if kind == "weights":
                inputs[reference] = Path(values[reference])
        option = key.rstrip("+") + ("+" if key.endswith("+") else "")
        words.append(f"--{option}={_text(_resolved(value, values))}")
    return Job(stage, scenario, seed, folder, tuple(words), inputs, tuple(needed.values()))


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    """Replace every ``${…}``; a value that is nothing but one reference keeps its type."""
    if isinstance(value, str):
        if (whole := REFERENCE.fullmatch(value)) is not None:
            return values[whole[1]]
        return REFERENCE.sub(lambda match: str(values[match[1]]), value)
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
