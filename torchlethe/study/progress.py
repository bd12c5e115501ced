"""What a study shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from torchlethe.study.files import DONE, read_json
from torchlethe.study.plan import Job
from torchlethe.study.runner import Outcome, Watcher

MARKS = {"done": "[green]✓[/green]", "failed": "[red]✗[/red]", "blocked": "[yellow]–[/yellow]", "kept": "[dim]=[/dim]"}
SHOWN = 8  # running stages that a terminal lists


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> duration(8.4), duration(61), duration(3600 * 26)
        ('8 s', '1 min', '26 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


class Display(Watcher):
    """Stages done, stages running, and the time that is left.

    Args:
        console: where to show it.
        jobs: all jobs of the study.
        workers: how many run at a time.
    """

    def __init__(self, console: Console, jobs: Sequence[Job], workers: int = 1) -> None:
        self.console = console
        self.workers = max(1, workers)
        self.open = {job.folder: job for job in jobs}
        self.total = len(jobs)
        self.begin = time.perf_counter()
        self.running: dict[str, float] = {}
        self.known: dict[str, list[float]] = {}
        self.title = ""
        for job in jobs:
            # what a stage took the last time says how long it takes now
            if seconds := read_json(job.folder / DONE).get("seconds"):
                self.known.setdefault(job.stage.base, []).append(float(seconds))
        self.live = Live(console=console, transient=True, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def say(self, text: str) -> None:
        """Show what happens besides the stages."""
        self.title = text
        if not self.console.is_terminal:
            self.console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def start(self, job: Job) -> None:
        """Show the running stage."""
        self.running[job.title] = time.perf_counter()

    def end(self, outcome: Outcome) -> None:
        """Count it, and leave a line for what ran, failed or was taken over."""
        job = outcome.job
        self.open.pop(job.folder, None)
        self.running.pop(job.title, None)
        if outcome.status == "done":
            self.known.setdefault(job.stage.base, []).append(outcome.seconds)
        if outcome.status == "kept" and not outcome.message:
            return
        line = f"{MARKS[outcome.status]} {escape(job.title)} [dim]{outcome.seconds:.1f} s"
        if outcome.status == "kept":
            line += f" then, {escape(outcome.message)}"
        if not self.console.is_terminal:
            line += f" ({self.counts()})"
        self.console.print(f"{line}[/dim]", soft_wrap=True)

    def remaining(self) -> float | None:
        """Seconds until the study is done, by what stages of the same name took; None before any is known."""
        everything = [seconds for times in self.known.values() for seconds in times]
        if not everything:
            return None
        mean = statistics.fmean(everything)
        left = 0.0
        now = time.perf_counter()
        for job in self.open.values():
            expected = statistics.fmean(self.known.get(job.stage.base, [mean]))
            left += max(0.0, expected - (now - self.running[job.title]) if job.title in self.running else expected)
        return left / min(self.workers, max(1, len(self.open)))

    def counts(self) -> str:
        """How far the study is, in words."""
        text = f"{self.total - len(self.open)} of {self.total}"
        left = self.remaining()
        return text if left is None or not self.open else f"{text}, about {duration(left)} left"

    def _render(self) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        passed = duration(time.perf_counter() - self.begin)
        state = Text(f"{self.counts()}, {len(self.running)} running, {passed} so far  {self.title}")
        line.add_row(ProgressBar(self.total, self.total - len(self.open), width=24), state)
        now = time.perf_counter()
        rows: list[RenderableType] = [line]
        for title, since in list(self.running.items())[:SHOWN]:
            rows.append(Spinner("dots", Text(f"{title}  {duration(now - since)}", style="dim")))
        if len(self.running) > SHOWN:
            rows.append(Text(f"  and {len(self.running) - SHOWN} more", style="dim"))
        return Group(*rows)
