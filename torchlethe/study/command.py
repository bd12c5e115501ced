"""``lethe study``: run a study file and write its table and report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from torchlethe._cli.catalog import find_config
from torchlethe._cli.errors import UsageError, suggest
from torchlethe.study.plan import Job, plan_jobs
from torchlethe.study.runner import LOG, Outcome, RunStage, Watcher, run_jobs, why, write_text
from torchlethe.study.spec import Study, load_study


class _Parser(argparse.ArgumentParser):
    """Errors become exceptions, so that the command says them in its own way."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing the usage."""
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lethe study",
        description="Run a graph of stages; what is done is kept. Ends in table.md, table.csv and report.html.",
        epilog="example: lethe study configs/digits/study.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the study; lethe list configs shows the shipped ones")
    parser.add_argument("--output", metavar="DIR", help="folder of the results, instead of the file's")
    parser.add_argument(
        "--force", metavar="STAGE", action="append", default=[], help="run a stage although it is done (repeatable)"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="show what would run and why")
    return parser


def study(words: Sequence[str], run_stage: RunStage) -> int:
    """Run ``lethe study``.

    Args:
        words: the command line after ``study``.
        run_stage: runs one stage in this process, see :func:`torchlethe.study.runner.run_jobs`.

    Returns:
        0, or 1 when a stage failed.
    """
    options = _parser().parse_args(list(words))
    console = Console(stderr=True, highlight=False)
    spec = load_study(find_config(options.file))
    for name in options.force:
        if name not in spec.stages:
            raise UsageError(f"--force: there is no stage '{name}'{suggest(name, spec.stages)}")
    jobs = plan_jobs(spec, options.output)
    root = Path(options.output) if options.output else spec.output
    if options.dry_run:
        return _dry_run(console, jobs, options.force)
    begin = time.perf_counter()
    with _Display(console, jobs) as display:
        outcomes = run_jobs(jobs, run_stage, options.force, display)
        display.say("writing the report")
        report = write_results(spec, outcomes, root, list(words))
    failed = [outcome for outcome in outcomes if outcome.status in ("failed", "blocked")]
    for outcome in failed:
        text = f"{outcome.job.title}: {outcome.message.rstrip('.')}"
        where = f" (see {outcome.job.folder / LOG})" if outcome.status == "failed" else ""
        console.print(f"[red]{outcome.status}[/red] {_escape(text)}{where}", soft_wrap=True)
    done, kept = (sum(outcome.status == status for outcome in outcomes) for status in ("done", "kept"))
    console.print(f"{done} stages run, {kept} kept, {len(failed)} failed in {time.perf_counter() - begin:.0f} s")
    console.print(f"table   {report.with_name('table.md')}", soft_wrap=True)
    console.print(f"report  {report}", soft_wrap=True)
    return 1 if failed else 0


def write_results(spec: Study, outcomes: Sequence[Outcome], root: Path, words: Sequence[str]) -> Path:
    """Write ``table.md``, ``table.csv`` and ``report.html``.

    Args:
        spec: the study.
        outcomes: of its jobs.
        root: the folder to write to.
        words: the command line that reproduces it, after ``lethe study``.

    Returns:
        The path of the report.
    """
    import shlex

    from torchlethe.study.environment import environment
    from torchlethe.study.report import render
    from torchlethe.study.results import collect, markdown, table_csv

    results = collect(spec, outcomes)
    write_text(root / "table.md", markdown(results))
    write_text(root / "table.csv", table_csv(results))
    report = root / "report.html"
    command = shlex.join(["lethe", "study", *words])
    write_text(report, render(results, environment(spec.path.parent), command))
    return report


def _dry_run(console: Console, jobs: Sequence[Job], force: Sequence[str]) -> int:
    pending: set[Path] = set()
    for job in jobs:
        reason = why(job, force)
        if not reason and any(need.folder in pending for need in job.needs):
            reason = "what it needs runs again"
        if reason:
            pending.add(job.folder)
        console.print(f"{'run ' if reason else 'keep'}  {job.title}{f'  [dim]{reason}[/dim]' if reason else ''}")
    console.print(f"{len(pending)} of {len(jobs)} stages would run")
    return 0


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


class _Display(Watcher):
    """Stages done and running with the elapsed time; plain lines where there is no terminal."""

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=len(jobs))
        self.kept = 0

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Show what happens now."""
        self.progress.update(self.task, description=text)

    def start(self, job: Job) -> None:
        """Show the running stage."""
        self.say(job.title)

    def end(self, outcome: Outcome) -> None:
        """Count it, and leave a line for what ran or failed."""
        self.progress.advance(self.task)
        if outcome.status == "kept":
            return
        mark = {"done": "[green]✓[/green]", "failed": "[red]✗[/red]", "blocked": "[yellow]–[/yellow]"}[outcome.status]
        self.console.print(f"{mark} {_escape(outcome.job.title)} [dim]{outcome.seconds:.1f} s[/dim]")
