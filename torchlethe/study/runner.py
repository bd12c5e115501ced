"""Running jobs in order: skip what is done, survive being killed, keep going past a failure.

A job's folder holds ``stage.json`` from its first moment and ``done.json`` as its last act, both written atomically.
``done.json`` carries the job's key; a job whose key has changed, or that has no ``done.json``, runs again from a clean
folder. Nothing else is remembered, so a study can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from torchlethe import __version__
from torchlethe._cli.errors import UsageError, explain
from torchlethe.study.plan import Job

RunStage = Callable[[str, list[str]], Any]
DONE, STARTED, LOG, ERROR = "done.json", "stage.json", "log.txt", "error.txt"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        status: ``done`` (ran now), ``kept`` (was done), ``failed`` or ``blocked`` (a job that it needs failed).
        seconds: how long it ran, now or when it was done.
        message: for a failure, one sentence.
    """

    job: Job
    status: str
    seconds: float = 0.0
    message: str = ""


class Watcher:
    """What a display may want to know; the base class ignores all of it."""

    def start(self, job: Job) -> None:
        """A job begins."""

    def end(self, outcome: Outcome) -> None:
        """A job has ended, or was skipped."""


def why(job: Job, force: Collection[str] = ()) -> str:
    """Why a job has to run, or an empty string when its result still counts.

    Args:
        job: the job; its inputs need not exist.
        force: names of stages that run in any case.
    """
    if job.stage.name in force:
        return "forced"
    done = read_json(job.folder / DONE)
    if not done:
        return "interrupted" if (job.folder / STARTED).is_file() else "new"
    if any(not path.is_file() for path in job.inputs.values()):
        return "an input is missing"
    return "" if done.get("key") == job.key() else "its configuration, its inputs or Lethe changed"


def run_jobs(
    jobs: Sequence[Job], run_stage: RunStage, force: Collection[str] = (), watcher: Watcher | None = None
) -> list[Outcome]:
    """Run jobs one after another in this process.

    Args:
        jobs: each after those that it needs, as :func:`~torchlethe.study.plan.plan_jobs` gives them.
        run_stage: runs ``lethe COMMAND WORDS`` and raises when that fails.
        force: names of stages to run although they are done.
        watcher: is told about each job.

    Returns:
        One outcome per job. A failed job does not stop those that do not need it.
    """
    watcher = watcher or Watcher()
    outcomes: dict[Path, Outcome] = {}
    for job in jobs:
        lost = [need.title for need in job.needs if outcomes[need.folder].status in ("failed", "blocked")]
        if lost:
            outcome = Outcome(job, "blocked", message=f"needs {', '.join(lost)}")
        elif not why(job, force):
            outcome = Outcome(job, "kept", float(read_json(job.folder / DONE).get("seconds", 0.0)))
        else:
            watcher.start(job)
            outcome = _run(job, run_stage)
        outcomes[job.folder] = outcome
        watcher.end(outcome)
    return list(outcomes.values())


def _run(job: Job, run_stage: RunStage) -> Outcome:
    _clean(job.folder)
    write_json(job.folder / STARTED, {"command": job.command, "started": now(), "lethe": __version__})
    begin = time.perf_counter()
    try:
        with captured(job), _command_line(job):
            run_stage(job.stage.command, list(job.words))
    except Exception as error:
        (job.folder / ERROR).write_text(traceback.format_exc(), "utf-8")
        return Outcome(job, "failed", time.perf_counter() - begin, explain(error))
    except SystemExit as stop:  # Lightning turns an interrupt from the keyboard into an exit
        raise KeyboardInterrupt(f"{job.title} stopped ({stop.code})") from stop
    seconds = time.perf_counter() - begin
    record = {
        "key": job.key(),
        "seconds": seconds,
        "finished": now(),
        "lethe": __version__,
        "command": job.command,
        "inputs": sorted(job.inputs),
    }
    write_json(job.folder / DONE, record)
    return Outcome(job, "done", seconds)


def _clean(folder: Path) -> None:
    """Empty a job's folder; a folder that is not ours is left alone."""
    # what starts with a dot is a temporary file of an atomic write that was killed
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        if not (folder / STARTED).is_file():
            raise UsageError(f"the folder '{folder}' is not empty and is no stage of a study; choose another --output")
        (folder / DONE).unlink(missing_ok=True)  # first, so that a kill in between leaves no half-empty "done" folder
        for path in folder.iterdir():
            if path.name != STARTED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


class _Redirected(io.TextIOBase):
    """A text stream that goes to a log while there is one, and then to wherever the process writes at that time."""

    def __init__(self, name: str, log: TextIO) -> None:
        self.stream_name = name
        self.log: TextIO | None = log

    @property
    def target(self) -> TextIO:
        if self.log is not None:
            return self.log
        current = getattr(sys, self.stream_name)
        return current if current is not self else getattr(sys, f"__{self.stream_name}__")

    def write(self, text: str, /) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        self.target.flush()

    def writable(self) -> bool:
        return True


@contextlib.contextmanager
def captured(job: Job) -> Iterator[None]:
    """Send what a stage writes and logs to ``log.txt`` in its folder."""
    with (job.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:
        log.write(f"$ {job.command}\n")
        out, err = _Redirected("stdout", log), _Redirected("stderr", log)
        loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
        handlers = {
            handler for logger in loggers for handler in logger.handlers if type(handler) is logging.StreamHandler
        }
        before = {handler: handler.stream for handler in handlers}
        # not by setStream, which flushes the old stream even when it was closed meanwhile
        for handler in handlers:
            handler.stream = err
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
        finally:
            # a handler that was made inside keeps its stream, which must not end with the file
            out.log = err.log = None
            for handler, stream in before.items():
                handler.stream = stream


@contextlib.contextmanager
def _command_line(job: Job) -> Iterator[None]:
    """Show ``lethe fit …`` as this process's command, since DDP starts its other ranks by repeating it."""
    before = sys.argv
    sys.argv = [before[0], job.stage.command, *job.words]
    try:
        yield
    finally:
        sys.argv = before


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty when it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one atomic step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file in one atomic step."""
    from torchlethe.io import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(content, "utf-8")
