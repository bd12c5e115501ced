"""``lethe study``: run a study file and write its table and report."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from torchlethe._cli.catalog import find_config
from torchlethe._cli.errors import UsageError, suggest
from torchlethe._cli.parser import Parser
from torchlethe.study.keys import report_key
from torchlethe.study.plan import Job, plan_jobs
from torchlethe.study.progress import Display
from torchlethe.study.reader import load_study
from torchlethe.study.runner import LOG, STUDY, Launcher, RunStage, Shelf, read_json, run_jobs, why, write_json

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


def study(words: Sequence[str], run_stage: RunStage) -> int:
    """Run ``lethe study``.

    Args:
        words: the command line after ``study``.
        run_stage: runs one stage in its process, see :func:`torchlethe.study.runner.run_jobs`.

    Returns:
        0, or 1 when a stage failed.
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
    if options.explain_metrics:
        from torchlethe.study.explain import explain_metrics

        return explain_metrics(spec.metrics)
    jobs = plan_jobs(spec, options.output)
    root = Path(options.output) if options.output else spec.output
    if options.dry_run:
        return _dry_run(console, jobs, options.force, options.ignore_code, None if options.no_reuse else root)
    begin = time.perf_counter()
    with alone(root):
        idle = not any(why(job, options.force, options.ignore_code) for job in jobs)
        launcher = Launcher(run_stage) if idle else _launcher(options, run_stage, root, spec.slurm)
        record = read_json(root / STUDY)
        known = {"study": spec.name, "file": spec.path.name}
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
                from torchlethe.study.output import write_results

                report = write_results(spec, outcomes, root, list(words))
                write_json(root / STUDY, known)
    failed = [outcome for outcome in outcomes if outcome.status in ("failed", "blocked")]
    for outcome in failed:
        text = f"{outcome.job.title}: {outcome.message.rstrip('.')}"
        where = f" (see {outcome.job.folder / LOG})" if outcome.status == "failed" else ""
        console.print(f"[red]{outcome.status}[/red] {escape(text)}{escape(where)}", soft_wrap=True)
    done, kept = (sum(outcome.status == status for outcome in outcomes) for status in ("done", "kept"))
    console.print(f"{done} stages run, {kept} kept, {len(failed)} failed in {time.perf_counter() - begin:.0f} s")
    console.print(f"table   {escape(str(report.with_name('table.md')))}", soft_wrap=True)
    console.print(f"report  {escape(str(report))}", soft_wrap=True)
    return 1 if failed else 0


def _launcher(options: argparse.Namespace, run_stage: RunStage, root: Path, slurm: Mapping[str, Any]) -> Launcher:
    given = dict(slurm)
    for word in options.slurm:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--slurm is '{word}', but must be KEY=VALUE, such as partition=gpu")
        given[key] = yaml.safe_load(value)
    if options.runner == "workers":
        from torchlethe.study.workers import Workers

        return Workers(run_stage, options.workers, threads=options.threads)
    from torchlethe.study.cluster import Cluster

    return Cluster(run_stage, root, options.runner, given, options.workers, options.threads)


def _dry_run(console: Console, jobs: Sequence[Job], force: Sequence[str], ignore_code: bool, root: Path | None) -> int:
    pending: dict[Path, Job] = {}
    shelf = Shelf(root)
    for job in jobs:
        reason = why(job, force, ignore_code)
        again = [need.title for need in job.needs if need.folder in pending]
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
    console.print(f"{len(pending)} of {len(jobs)} stages would run")
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
