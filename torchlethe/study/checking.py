"""Reading the configurations of all stages before the first one runs, so that a typo stops no study at its end."""

from __future__ import annotations

import multiprocessing.connection
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torchlethe.study.plan import Job
from torchlethe.study.search import trial_job
from torchlethe.study.search_space import parse_search

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CheckStage = Callable[[str, list[str]], str]
NUMBER = re.compile(r"(?<![\w.-])-?\d+(\.\d*)?(e[+-]?\d+)?(?![\w.])")
NAMED = 3  # stages that a message lists


def check_jobs(jobs: Sequence[Job], check_stage: CheckStage, context: Any, workers: int = 1) -> dict[str, list[str]]:
    """Read the configuration of each job that differs from the others by more than a number.

    A job with a configuration file that another stage has yet to write is left out.

    Args:
        jobs: those that would run.
        check_stage: says what is wrong with ``lethe COMMAND WORDS`` in one sentence, or nothing.
        context: of multiprocessing, which starts the processes that read.
        workers: how many of them.

    Returns:
        The titles of the wrong jobs by what is wrong with them; empty when all is well.
    """
    distinct: dict[Any, Job] = {}
    for job in jobs:
        if all(path.is_file() for path in job.files):
            distinct.setdefault(_shape(job), job)
    calls = [(_title(job), job.stage.command, list(_example(job).words)) for job in distinct.values()]
    readers = []
    for share in (calls[start::workers] for start in range(min(workers, len(calls)))):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_read, args=(sender, share, check_stage), daemon=True)
        process.start()
        sender.close()
        readers.append((process, receiver))
    wrong: dict[str, str] = {}
    try:
        for process, receiver in readers:
            multiprocessing.connection.wait([receiver, process.sentinel])
            try:
                wrong |= receiver.recv()
            except (EOFError, OSError):  # whatever ended it will be told by the stage
                continue
    finally:
        for process, receiver in readers:
            process.kill()
            process.join()
            receiver.close()
    found: dict[str, list[str]] = {}
    for title in (title for title, _, _ in calls if title in wrong):
        found.setdefault(wrong[title], []).append(title)
    return found


def sentences(wrong: dict[str, list[str]]) -> list[str]:
    """What :func:`check_jobs` found, as one line per message.

    Args:
        wrong: the titles by message.

    Example:
        >>> sentences({"a is -1.": ["sfron", "tune"]})
        ['sfron, tune: a is -1.']
    """
    lines = []
    for message, titles in wrong.items():
        more = f" and {len(titles) - NAMED} more" if len(titles) > NAMED else ""
        lines.append(f"{', '.join(titles[:NAMED])}{more}: {message}")
    return lines


def _shape(job: Job) -> Any:
    """What a job's configuration is but for its numbers, so that seeds and most grids are read once."""
    words = [NUMBER.sub(lambda found: "0.5" if found[1] or found[2] else "0", word) for word in job.template]
    return job.stage.command, job.files, tuple(words), repr(job.stage.search)


def _title(job: Job) -> str:
    return job.title.removesuffix(f" · seed {job.seed}")


def _example(job: Job) -> Job:
    """The job itself, or a trial of a search."""
    if job.stage.search is None:
        return job
    search = parse_search(job.stage.search, command=job.stage.command, method=job.stage.method)
    first = {key: values[0] if isinstance(values, list) else values["low"] for key, values in search.space.items()}
    return trial_job(job, 0, first)


def _read(sender: Connection, calls: Sequence[tuple[str, str, list[str]]], check_stage: CheckStage) -> None:
    """Send what is wrong with some calls, by title."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(quiet, descriptor)
    found = {title: message for title, command, words in calls if (message := check_stage(command, words))}
    sender.send(found)
