"""Which jobs run, in which order: skip what is done, take over what another study did, keep going past a failure.

``done.json`` in a job's folder carries the job's key and the fingerprints of its data; a job whose key or data has
changed, or that has no ``done.json``, runs. Nothing else is remembered, so a study can be killed at any moment. How
jobs are started is up to a :class:`Launcher`: in this process, in worker processes, or on a cluster.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

from torchlethe.study.files import DONE, ERROR, LOG, STARTED, now, read_json, write_json, write_text
from torchlethe.study.fingerprints import fingerprint
from torchlethe.study.keys import difference, identify
from torchlethe.study.plan import Job
from torchlethe.study.stage import Outcome, RunStage, adopt, check_folder, execute

__all__ = [
    "DONE",
    "ERROR",
    "LOG",
    "STARTED",
    "STUDY",
    "Launcher",
    "Outcome",
    "RunStage",
    "Shelf",
    "Watcher",
    "now",
    "read_json",
    "run_jobs",
    "why",
    "write_json",
    "write_text",
]
STUDY = "study.json"  # marks the output folder of a study


class Watcher:
    """What a display may want to know; the base class ignores all of it."""

    def start(self, job: Job) -> None:
        """A job begins."""

    def end(self, outcome: Outcome) -> None:
        """A job has ended, or was skipped."""


class Launcher:
    """Starts jobs; the base class runs each in this process as it starts.

    Args:
        run_stage: runs ``lethe COMMAND WORDS`` and raises when that fails.
    """

    def __init__(self, run_stage: RunStage) -> None:
        self.run_stage = run_stage
        self.ended: list[Outcome] = []

    def room(self, job: Job) -> bool:
        """Whether the job can start now."""
        return not self.ended

    def start(self, job: Job, fresh: bool = False) -> None:
        """Start a job that there is room for.

        Args:
            job: its needs are done.
            fresh: whether it must not go on from a checkpoint.
        """
        self.ended.append(execute(job, self.run_stage, fresh))

    def wait(self) -> list[Outcome]:
        """Wait until at least one job has ended."""
        ended, self.ended = self.ended, []
        return ended

    def stop(self) -> None:
        """End what still runs."""


def why(job: Job, force: Collection[str] = (), ignore_code: bool = False) -> str:
    """Why a job has to run, or an empty string when its result still counts.

    Args:
        job: the job; its inputs need not exist.
        force: names of stages that run in any case.
        ignore_code: let results of other code count.
    """
    if {job.stage.name, job.stage.base} & set(force):
        return "forced"
    done = read_json(job.folder / DONE)
    if not done:
        if (job.folder / ERROR).is_file():
            return "it failed the last time"
        return "interrupted" if (job.folder / STARTED).is_file() else "new"
    for reference, path in job.inputs.items():
        if not path.is_file():
            return f"its input ${{{reference}}} is missing"
    identity = identify(job)
    if done.get("key") != identity.key:
        # a key without parts is that of an older version
        change = difference(done.get("parts") or {"the command": "?"}, identity.parts, ignore_code)
        if change or not ignore_code:
            return change or "what it depends on changed"
    moved = [path for path, mark in done.get("data", {}).items() if fingerprint(path) != mark]
    return f"its data changed: {', '.join(moved)}" if moved else ""


def run_jobs(
    jobs: Sequence[Job],
    run_stage: RunStage,
    force: Collection[str] = (),
    watcher: Watcher | None = None,
    launcher: Launcher | None = None,
    root: Path | None = None,
    ignore_code: bool = False,
) -> list[Outcome]:
    """Run jobs, each after those that it needs.

    Args:
        jobs: each after those that it needs, as :func:`~torchlethe.study.plan.plan_jobs` gives them.
        run_stage: runs ``lethe COMMAND WORDS`` and raises when that fails.
        force: names of stages to run although they are done.
        watcher: is told about each job.
        launcher: starts them; one after another in this process by default.
        root: the study's output folder, beside which results of other studies are looked for; None for nowhere.
        ignore_code: let results of other code count.

    Returns:
        One outcome per job, in the order of the jobs. A failed job does not stop those that do not need it.
    """
    watcher, launcher = watcher or Watcher(), launcher or Launcher(run_stage)
    shelf = Shelf(root)
    outcomes: dict[Path, Outcome] = {}
    waiting = list(jobs)
    running: dict[Path, Job] = {}
    reasons: dict[Path, str] = {}

    def settle(outcome: Outcome) -> None:
        running.pop(outcome.job.folder, None)
        outcomes[outcome.job.folder] = outcome
        watcher.end(outcome)

    fingerprint.cache_clear()
    try:
        while waiting or running:
            full = False
            for job in list(waiting):
                if any(need.folder not in outcomes for need in job.needs):
                    continue
                lost = [need.title for need in job.needs if outcomes[need.folder].status in ("failed", "blocked")]
                if lost:
                    waiting.remove(job)
                    settle(Outcome(job, "blocked", message=f"needs {', '.join(lost)}"))
                    continue
                if job.folder not in reasons:
                    reason = reasons[job.folder] = why(job, force, ignore_code)
                    source = shelf.find(job) if reason and reason != "forced" else None
                    if source is not None:
                        adopt(job, source)
                    if not reason or source is not None:
                        waiting.remove(job)
                        message = f"taken over from {source}" if source is not None else ""
                        settle(Outcome(job, "kept", float(read_json(job.folder / DONE).get("seconds", 0.0)), message))
                        continue
                # jobs start in their order, so that one which needs the whole machine gets its turn
                full = full or not launcher.room(job)
                if not full:
                    check_folder(job.folder)
                    waiting.remove(job)
                    running[job.folder] = job
                    watcher.start(job)
                    launcher.start(job, reasons[job.folder] == "forced")
            if running:
                for outcome in launcher.wait():
                    fingerprint.cache_clear()
                    settle(outcome)
    finally:
        launcher.stop()
    return [outcomes[job.folder] for job in jobs]


class Shelf:
    """The results of the same user's other studies in the folders beside a study's output.

    Args:
        root: the study's output folder; None for an empty shelf.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root

    @cached_property
    def _folders(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        if self.root is None:
            return found
        own = self.root.resolve()
        for sibling in own.parent.iterdir() if own.parent.is_dir() else ():
            with contextlib.suppress(OSError):  # of others, which nobody may read
                mine = not hasattr(os, "getuid") or sibling.stat().st_uid == os.getuid()
                if mine and sibling != own and (sibling / STUDY).is_file():
                    for path in sibling.rglob(DONE):
                        found.setdefault(str(read_json(path).get("key")), []).append(path.parent)
        return found

    @property
    def filled(self) -> bool:
        """Whether there is any result."""
        return bool(self._folders)

    def find(self, job: Job) -> Path | None:
        """The folder of an equal job whose data is the same as now."""
        if self.root is None:
            return None
        for folder in self._folders.get(identify(job).key, []):
            done = read_json(folder / DONE)
            if done and all(fingerprint(path) == mark for path, mark in done.get("data", {}).items()):
                return folder
        return None
