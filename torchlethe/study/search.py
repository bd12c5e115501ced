"""Search stages: the settings that do best on validation data, found by Optuna in trials of one stage.

A stage becomes a search by its key ``search``::

    tuning:
      per: [seed]
      config: [data.yaml, original.yaml]
      set: {data.init_args.validation: 0.1}
      search:
        sampler: tpe                  # or random, grid
        trials: 20                    # a grid runs all its points
        metric: val_loss
        direction: minimize
        space:
          model.init_args.optimizer.init_args.lr: {low: 0.001, high: 1.0, log: true}
          model.init_args.label_smoothing: [0.0, 0.1]

Each trial is a run of its own in ``trials/NNN``, through the runner that runs stages. What has been tried is kept in
Optuna's journal ``search.log``, so a search that was killed goes on with the trial that was cut off. It ends with
``best.yaml``, a configuration file for other stages (``config: ["${tuning.best}"]``), and ``trials.csv``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from torchlethe._cli.errors import UsageError, suggest
from torchlethe.study.files import DONE, read_json, write_text
from torchlethe.study.plan import Job
from torchlethe.study.search_space import NOT_THE_TRIAL, ON_TEST_DATA, Search, parse_search

if TYPE_CHECKING:
    import optuna

    from torchlethe.study.stage import RunStage

JOURNAL, BEST, TABLE, TRIALS = "search.log", "best.yaml", "trials.csv", "trials"


def run_search(job: Job, run_stage: RunStage) -> None:
    """Run the trials of a search stage that have not run yet, and write its result.

    Args:
        job: the job of the stage; its folder may hold a search that was cut off.
        run_stage: runs ``lethe COMMAND WORDS`` and raises when that fails.

    Raises:
        UsageError: the search is wrong, or no trial succeeded.
    """
    stage = job.stage
    search = parse_search(stage.search or {}, f"stages.{stage.base}.search", command=stage.command, method=stage.method)
    study = _open(job.folder / JOURNAL, search)
    while len(done := _ended(study)) < search.trials:
        number = len(done)
        study.sampler = _sampler(search, number, job.seed)
        trial = study.ask(_distributions(search))
        settings = {key: _value(search.space[key], trial.params[key]) for key in search.space}
        value, seconds, message = _run_trial(job, run_stage, search, number, settings)
        trial.set_user_attr("seconds", round(seconds, 3))
        if value is None:
            trial.set_user_attr("message", message)
            study.tell(trial, state=_state("FAIL"))
        else:
            study.tell(trial, value)
        sys.stdout.write(f"trial {number}: {search.metric} {'failed' if value is None else value} {settings}\n")
        _keep_best(job.folder, study)
        write_text(job.folder / TABLE, _table(search, study))
    messages = [trial.user_attrs["message"] for trial in done if trial.state == _state("FAIL")]
    if len(messages) == len(done):
        raise UsageError(f"all {len(done)} trials failed, the first with: {messages[0]}")
    _write_result(job, search, study)


def _open(path: Path, search: Search) -> optuna.Study:
    """The study of the journal, without the trial that was cut off."""
    try:
        import optuna
    except ImportError:
        raise UsageError("a search needs Optuna: pip install 'torchlethe[search]'") from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # a killed process may leave its lock and half a line; nobody else writes here
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink()
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="search", direction=search.direction, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
        study.tell(trial.number, state=_state("FAIL"))
    return study


def _ended(study: optuna.Study) -> list[Any]:
    """The trials that count: with a value, or with the message of their failure; not those that were cut off."""
    found = study.get_trials(deepcopy=False, states=(_state("COMPLETE"), _state("FAIL")))
    return [trial for trial in found if trial.state == _state("COMPLETE") or "message" in trial.user_attrs]


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _sampler(search: Search, number: int, seed: int | None) -> Any:
    """The sampler of one trial.

    What it proposes depends on seed, number and the trials before only, so that a resumed search is the same.
    """
    from optuna import samplers

    if search.sampler == "grid":
        return _point(search.grid[number])
    own = search.seed if search.seed is not None else seed or 0
    mixed = int.from_bytes(hashlib.sha256(f"{own} {number}".encode()).digest()[:4], "big")
    return samplers.RandomSampler(mixed) if search.sampler == "random" else samplers.TPESampler(seed=mixed)


def _point(values: Mapping[str, Any]) -> Any:
    """A sampler that proposes one point."""
    from optuna.samplers import BaseSampler

    class Point(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return _choice(values[param_name])

    return Point()


def _distributions(search: Search) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, values in search.space.items():
        if isinstance(values, list):
            found[key] = CategoricalDistribution([_choice(value) for value in values])
        else:
            kind = IntDistribution if values.get("int") else FloatDistribution
            found[key] = kind(values["low"], values["high"], log=bool(values.get("log")))
    return found


def _choice(value: Any) -> Any:
    """What stands for a value in Optuna, which takes plain ones only."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _value(values: Any, chosen: Any) -> Any:
    """The value that a choice stands for."""
    if not isinstance(values, list):
        return chosen
    return next(value for value in values if type(_choice(value)) is type(chosen) and _choice(value) == chosen)


def _run_trial(
    job: Job, run_stage: RunStage, search: Search, number: int, settings: Mapping[str, Any]
) -> tuple[float | None, float, str]:
    """Run one trial as a job of its own; its value or None, its seconds, and what went wrong."""
    from torchlethe.study.runner import why
    from torchlethe.study.stage import execute

    trial = trial_job(job, number, settings)
    if why(trial):
        outcome = execute(trial, run_stage)
        if outcome.status == "failed":
            return None, outcome.seconds, outcome.message
    seconds = float(read_json(trial.folder / DONE).get("seconds", 0.0))
    found = {**read_json(trial.folder / "evaluation.json"), **read_json(trial.folder / "metrics.json")}
    value = found.get(search.metric)
    if search.metric not in found:
        names = [name for name in found if name != "meta" and not name.startswith((*ON_TEST_DATA, *NOT_THE_TRIAL))]
        raise UsageError(
            f"trial {number} has no metric '{search.metric}'{suggest(search.metric, names)}; "
            "validation data are held out by the data's argument 'validation'"
        )
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None, seconds, f"'{search.metric}' is {value}."
    return float(value), seconds, ""


def trial_job(job: Job, number: int, settings: Mapping[str, Any]) -> Job:
    """The job of one trial: the stage's own, in a folder below its, with some settings more.

    Args:
        job: of the search stage.
        number: of the trial, from 0.
        settings: values by dotted key.
    """
    folder = job.folder / TRIALS / f"{number:03d}"
    place = "--trainer.default_root_dir="
    extra = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    words = [f"{place}{folder}" if word.startswith(place) else word for word in job.words]
    return replace(
        job,
        stage=replace(job.stage, search=None, point=f"trial {number}"),
        folder=folder,
        words=(*words, *extra),
        template=(*job.template, *extra),
    )


def _keep_best(folder: Path, study: optuna.Study) -> None:
    """Remove the weights and checkpoints of all trials but the best: a search would fill the disk with them."""
    best = _best(study)
    for number in range(len(_ended(study))):
        if number != best:
            for path in (folder / TRIALS / f"{number:03d}").rglob("*"):
                if path.suffix in (".safetensors", ".ckpt"):
                    path.unlink()


def _best(study: optuna.Study) -> int | None:
    """The number of the best trial; None when all have failed."""
    ended = _ended(study)
    found = [trial for trial in ended if trial.state == _state("COMPLETE")]
    return next(i for i, trial in enumerate(ended) if trial.number == study.best_trial.number) if found else None


def _table(search: Search, study: optuna.Study) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", search.metric, *search.space, "seconds", "message"])
    for number, trial in enumerate(_ended(study)):
        value = trial.value if trial.state == _state("COMPLETE") else ""
        parameters = [trial.params[key] for key in search.space]
        writer.writerow([number, value, *parameters, trial.user_attrs["seconds"], trial.user_attrs.get("message", "")])
    return text.getvalue()


def _write_result(job: Job, search: Search, study: optuna.Study) -> None:
    """``best.yaml``, and the best trial's configuration and weights as those of the stage."""
    number = _best(study)
    trial = _ended(study)[number or 0]
    folder = job.folder / TRIALS / f"{number:03d}"
    for name in ("config.yaml", "weights.safetensors"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, job.folder / name)
    nested: dict[str, Any] = {}
    for key in search.space:
        *outer, last = key.split(".")
        level = nested
        for part in outer:
            level = level.setdefault(part, {})
        level[last] = _value(search.space[key], trial.params[key])
    head = f"# The best of {search.trials} trials: {search.metric} = {trial.value:.6g} in trial {number}.\n"
    write_text(job.folder / BEST, head + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True))
