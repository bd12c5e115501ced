"""``lethe study``: run a study file and write its table and report."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from torchlethe._cli.catalog import find_config
from torchlethe._cli.errors import UsageError, close_match, suggest
from torchlethe._cli.parser import Parser
from torchlethe._cli.paths import check_output
from torchlethe.study.checking import CheckStage, check_jobs, sentences
from torchlethe.study.keys import report_key
from torchlethe.study.plan import Job, plan_jobs
from torchlethe.study.progress import Display
from torchlethe.study.reader import load_study
from torchlethe.study.runner import (
    ERROR,
    LOG,
    STUDY,
    Launcher,
    Outcome,
    RunStage,
    Shelf,
    read_json,
    run_jobs,
    why,
    write_json,
)
from torchlethe.study.spec import Study

RUNNERS = {
    "workers": "worker processes on this machine",
    "slurm": "jobs of a SLURM cluster, through submitit",
    "submitit": "jobs of submitit on this machine, to try out the former",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lethe study",
        description="Run a graph of stages; what is done is kept. Ends in tables, figures and report.html.",
        epilog="example: lethe study configs/digits/study.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the study; lethe list configs shows the shipped ones")
    parser.add_argument("--output", metavar="DIR", help="folder of the results, instead of the file's")
    parser.add_argument(
        "--force", metavar="STAGE", action="append", default=[], help="run a stage although it is done (repeatable)"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="show what would run and why")
    parser.add_argument("--ignore-code", action="store_true", help="let results of other code count as done")
    parser.add_argument(
        "--workers", metavar="N", type=int, help="stages at a time; the cores of this machine by default"
    )
    parser.add_argument(
        "--no-reuse", action="store_true", help="take over no results of studies beside the output folder"
    )
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="threads of each stage, 1 by default")
    parser.add_argument(
        "--runner",
        choices=RUNNERS,
        default="workers",
        help="; ".join(f"{key}: {text}" for key, text in RUNNERS.items()),
    )
    parser.add_argument(
        "--slurm", metavar="KEY=VALUE", action="append", default=[], help="a parameter of the jobs (repeatable)"
    )
    parser.add_argument("--explain-metrics", action="store_true", help="show what each metric means, and run nothing")
    return parser


def study(words: Sequence[str], run_stage: RunStage, check_stage: CheckStage | None = None) -> int:
    """Run ``lethe study``.

    Args:
        words: the command line after ``study``.
        run_stage: runs one stage in its process, see :func:`torchlethe.study.runner.run_jobs`.
        check_stage: says what is wrong with the configuration of a stage, for a look at all of them before any runs.

    Returns:
        0; 1 when a stage failed; 2 when nothing ran, as configurations of stages are wrong.
    """
    options = _parser().parse_args(list(words))
    console = Console(stderr=True, highlight=False)
    spec = load_study(find_config(options.file))
    names = list(dict.fromkeys(stage.base for stage in spec.stages.values()))
    for name in options.force:
        if name not in names and name not in spec.stages:
            raise UsageError(f"--force: there is no stage '{name}'{suggest(name, names)}")
    for option in ("workers", "threads"):
        if (value := getattr(options, option)) is not None and value < 1:
            raise UsageError(f"--{option} is {value}, but must be at least 1")
    slurm = _slurm(options, spec.slurm)
    if options.explain_metrics:
        from torchlethe.study.explain import explain_metrics

        return explain_metrics(spec.metrics)
    jobs = plan_jobs(spec, options.output)
    root = Path(options.output) if options.output else spec.output
    check_output("--output" if options.output else f"{spec.path}: 'output'", root)
    known = {"study": spec.name, "file": Path(os.path.relpath(spec.path.resolve(), root.resolve())).as_posix()}
    _refuse_other_results(root, known)
    if options.dry_run:
        _warn_of_metrics(console, spec)
        console = Console(highlight=False)  # the plan is what was asked for
        return _dry_run(console, jobs, options.force, options.ignore_code, None if options.no_reuse else root)
    begin = time.perf_counter()
    with alone(root):
        pending = [job for job in jobs if why(job, options.force, options.ignore_code)]
        launcher = _launcher(options, run_stage, root, slurm) if pending else Launcher(run_stage)
        if pending:
            _warn_of_metrics(console, spec)
            if check_stage is not None and not _are_sound(console, pending, check_stage, options.workers):
                return 2
        record = read_json(root / STUDY)
        missing = record.pop("missing", [])
        if not record:  # from now on other studies may look for results here
            write_json(root / STUDY, known)
        with Display(console, jobs, getattr(launcher, "workers", len(jobs))) as display:
            shelf = None if options.no_reuse else root
            outcomes = run_jobs(jobs, run_stage, options.force, display, launcher, shelf, options.ignore_code)
            report = root / "report.html"
            known["report"] = report_key(spec.path, jobs, words)
            complete = all(outcome.status in ("done", "kept") for outcome in outcomes)
            if not (complete and record == known and report.is_file()):
                display.say("writing the report")
                from torchlethe.study.collect import collect
                from torchlethe.study.output import write_results

                report = write_results(spec, outcomes, root, list(words))
                missing = collect(spec, outcomes).missing
                write_json(root / STUDY, {**known, **({"missing": missing} if missing else {})})
    _summarise(console, outcomes, time.perf_counter() - begin)
    console.print(f"table   {escape(str(report.with_name('table.md')))}", soft_wrap=True)
    console.print(f"report  {escape(str(report))}", soft_wrap=True)
    if missing:
        console.print(f"[yellow]not measured: {escape(', '.join(missing))}[/yellow]", soft_wrap=True)
    return 1 if any(outcome.status in ("failed", "blocked") for outcome in outcomes) else 0


def _summarise(console: Console, outcomes: Sequence[Outcome], seconds: float) -> None:
    """What failed and where to look, and how many stages came to what end."""
    for outcome in outcomes:
        if outcome.status not in ("failed", "blocked"):
            continue
        text = f"{outcome.job.title}: {outcome.message.rstrip('.')}"
        file = ERROR if (outcome.job.folder / ERROR).is_file() else LOG
        where = f" (see {outcome.job.folder / file})" if outcome.status == "failed" else ""
        console.print(f"[red]{outcome.status}[/red] {escape(text)}{escape(where)}", soft_wrap=True)
    found = [outcome.status for outcome in outcomes]
    text = f"{found.count('done')} stages run, {found.count('kept')} kept, {found.count('failed')} failed"
    if "blocked" in found:
        text += f", {found.count('blocked')} blocked by them"
    console.print(f"{text} in {seconds:.0f} s")


def _refuse_other_results(root: Path, known: Mapping[str, str]) -> None:
    """Results of something else are not overwritten; those of the same file, or of the same study moved, are."""
    record = read_json(root / STUDY)
    if record:
        if all(record.get(key) != value for key, value in known.items()):
            other = f"the study '{record.get('study')}' ({record.get('file')})"
            raise UsageError(f"the folder '{root}' holds the results of {other}; choose another --output")
        return
    for name in ("report.html", "table.md", "evaluation.json"):
        if (root / name).exists():
            raise UsageError(f"the folder '{root}' holds a {name} that is not of this study; choose another --output")


def _warn_of_metrics(console: Console, spec: Study) -> None:
    """Say which of the chosen metrics look misspelt; any other name may be what a stage logs."""
    if not spec.metrics:
        return
    from torchlethe.metrics.definitions import METRIC_DEFINITIONS, define_metric
    from torchlethe.study.results import OWN_DEFINITIONS

    hints = []
    for name in spec.metrics:
        if define_metric(name) is None and name not in OWN_DEFINITIONS:
            hint = close_match(name, [*METRIC_DEFINITIONS, *OWN_DEFINITIONS])
            hints += [f"'{name}'{hint}"] if hint else []
    if hints:
        text = f"note: 'metrics' names what the catalogue lacks: {' '.join(hints)}"
        console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def _are_sound(console: Console, jobs: Sequence[Job], check_stage: CheckStage, workers: int | None) -> bool:
    """Whether all configurations can be read; says what is wrong with the others."""
    from torchlethe.study.workers import Workers

    if not sys.platform.startswith("linux"):  # without a warm process to copy it would take too long
        return True
    reader = Workers(lambda *_: None, workers, gpus=[])
    lines = sentences(check_jobs(jobs, check_stage, reader.context, reader.workers))
    for line in lines:
        console.print(f"[red]wrong[/red] {escape(line)}", soft_wrap=True)
    if lines:
        console.print("nothing was run")
    return not lines


def _slurm(options: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the cluster's jobs: the study's own and those of the command line."""
    given = dict(own)
    if options.slurm and options.runner == "workers":
        raise UsageError(f"--slurm is '{options.slurm[0]}', but stages run on this machine; add --runner slurm")
    for word in options.slurm:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--slurm is '{word}', but must be KEY=VALUE, such as partition=gpu")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--slurm is '{word}', whose value is not YAML") from None
    return given


def _launcher(options: argparse.Namespace, run_stage: RunStage, root: Path, slurm: Mapping[str, Any]) -> Launcher:
    if options.runner == "workers":
        from torchlethe.study.workers import Workers

        return Workers(run_stage, options.workers, threads=options.threads)
    from torchlethe.study.cluster import Cluster

    return Cluster(run_stage, root, options.runner, slurm, options.workers, options.threads)


def _dry_run(console: Console, jobs: Sequence[Job], force: Sequence[str], ignore_code: bool, root: Path | None) -> int:
    pending: dict[Path, Job] = {}
    shelf = Shelf(root)
    certain = True
    for job in jobs:
        reason = why(job, force, ignore_code)
        again = [need.title for need in job.needs if need.folder in pending]
        # what runs before it may come to the same result, or to one that another study went on from
        certain = certain and not (again and (not reason or shelf.filled))
        if again and (not reason or reason.startswith("its input")):
            reason = f"needs {', '.join(again)}, which {'runs' if len(again) == 1 else 'run'}"
        source = shelf.find(job) if reason and not again and reason != "forced" else None
        if reason and source is None:
            pending[job.folder] = job
        verb = "keep" if not reason else "run " if source is None else "take"
        detail = reason if source is None else f"from {source}"
        console.print(
            f"{verb}  {escape(job.title)}{f'  [dim]{escape(detail)}[/dim]' if detail else ''}", soft_wrap=True
        )
    console.print(f"{'' if certain else 'at most '}{len(pending)} of {len(jobs)} stages would run")
    return 0


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Refuse to write to a folder that another study is writing to.

    Args:
        root: the study's output folder.

    Raises:
        UsageError: another process is in this context with the folder.
    """
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")  # the system lets go of it when this process ends, however it does
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another study is writing to '{root}'; wait for it, or choose another --output") from None
    try:
        yield
    finally:
        lock.release()  # the file stays: removing it could take it from under a study that has just locked it
