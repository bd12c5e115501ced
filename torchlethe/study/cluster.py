"""Stages as jobs of a SLURM cluster, through submitit; or of submitit's local executor, to try that out.

What is ready at the same time and takes the same resources is submitted as one job array: all seeds, scenarios and grid
points of a stage. The jobs go on when the study's own process ends; the same command then finds them again. A job that
reaches its time limit is put into the queue again and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchlethe._cli.errors import UsageError
from torchlethe.study.files import read_json, write_json
from torchlethe.study.plan import Job
from torchlethe.study.runner import Launcher
from torchlethe.study.stage import Outcome, RunStage, execute, resumed_words
from torchlethe.study.workers import THREADS, in_subprocess, needs_of, record_end

# what submitit calls the same on every cluster; other names are SLURM's own
COMMON = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)
DEFAULTS = {"name": "lethe", "timeout_min": 240}
POLL = 1.0  # seconds; submitit itself asks SLURM less often


@dataclass(frozen=True)
class Task:
    """What a cluster's job does; a class, as submitit asks it what to do when the time is up.

    Attributes:
        job: the job of the study.
        run_stage: runs ``lethe COMMAND WORDS``.
        fresh: whether it must not go on from a checkpoint.
        threads: of each process.
    """

    job: Job
    run_stage: RunStage
    fresh: bool
    threads: int

    def __call__(self) -> tuple[str, float, str]:
        """Run the job; with several processes the first one keeps the folder's record."""
        os.environ.update(dict.fromkeys(THREADS, str(self.threads)))
        if int(os.environ.get("SLURM_PROCID", "0")):
            self.run_stage(self.job.stage.command, resumed_words(self.job, self.fresh))
            return ("done", 0.0, "")
        ranks = int(os.environ.get("SLURM_NTASKS", "1"))
        run_stage = in_subprocess if needs_of(self.job).alone and ranks == 1 else self.run_stage
        outcome = execute(self.job, run_stage, self.fresh, own_process=True)
        return (outcome.status, outcome.seconds, outcome.message)

    def checkpoint(self) -> Any:
        """Put it into the queue again, to go on from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, fresh=False))


class Cluster(Launcher):
    """Submits jobs and waits for them.

    Args:
        run_stage: as for :class:`~torchlethe.study.runner.Launcher`.
        root: the study's output folder, which every machine of the cluster sees.
        runner: ``slurm``, or ``submitit`` for its local executor.
        parameters: of the cluster's jobs, as submitit or SLURM name them.
        workers: how many jobs may be submitted at a time; all that are ready by default.
        threads: of each process.

    Raises:
        UsageError: submitit is not installed, there is no SLURM, or a parameter is unknown.
    """

    def __init__(
        self,
        run_stage: RunStage,
        root: Path,
        runner: str,
        parameters: Mapping[str, Any],
        workers: int | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(run_stage)
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UsageError(f"--runner {runner} needs submitit: pip install 'torchlethe[cluster]'") from None
        self.kind = "slurm" if runner == "slurm" else "local"
        self.folder = (root / "cluster").resolve()
        self.record = self.folder / "running.json"
        self.parameters = DEFAULTS | {"cpus_per_task": threads} | dict(parameters)
        self.limit, self.threads = workers, threads
        self.workers = workers or 64
        self.ready: list[tuple[Job, bool]] = []
        self.running: dict[Path, tuple[Job, Any]] = {}
        try:
            self.submitted: Any = self._executor(None)._executor.job_class
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise UsageError(f"--runner {runner}: {' '.join(str(error).split())}") from None

    def _executor(self, job: Job | None) -> Any:
        from submitit import AutoExecutor

        executor = AutoExecutor(folder=self.folder / "%j", cluster=self.kind)
        executor.update_parameters(**self._parameters(job))
        return executor

    def room(self, job: Job) -> bool:
        """Whether another job may be submitted."""
        return self.limit is None or len(self.running) + len(self.ready) < self.limit

    def start(self, job: Job, fresh: bool = False) -> None:
        """Take up a job that was submitted before, or put it with the next array."""
        known = read_json(self.record).get(str(job.folder))
        if known:
            submitted = self.submitted(folder=self.folder / "%j", job_id=known["id"])
            if known["key"] == job.key() and not fresh:
                if not self._ended(submitted) or submitted.paths.result_pickle.is_file():
                    self.running[job.folder] = (job, submitted)
                    return
            elif not self._ended(submitted):
                self._cancel(submitted)
        self.ready.append((job, fresh))

    def wait(self) -> list[Outcome]:
        """Submit what is ready, and wait until at least one job has ended."""
        self._submit()
        while True:
            ended = [(job, submitted) for job, submitted in self.running.values() if self._ended(submitted)]
            if ended:
                break
            time.sleep(POLL)
        for job, _ in ended:
            del self.running[job.folder]
        outcomes = [self._outcome(job, submitted) for job, submitted in ended]
        self._remember()
        return outcomes

    def stop(self) -> None:
        """End local jobs; those of a cluster go on, and the same command finds them again."""
        if self.kind == "local":
            for _, submitted in self.running.values():
                self._cancel(submitted)
            self.running = {}
            self._remember()

    def _submit(self) -> None:
        groups: dict[str, list[tuple[Job, bool]]] = {}
        for job, fresh in self.ready:
            groups.setdefault(repr((job.stage.base, self._parameters(job))), []).append((job, fresh))
        self.ready = []
        for group in groups.values():
            executor = self._executor(group[0][0])
            with executor.batch():
                found = [executor.submit(Task(job, self.run_stage, fresh, self.threads)) for job, fresh in group]
            for (job, _), submitted in zip(group, found, strict=True):
                self.running[job.folder] = (job, submitted)
            self._remember()

    def _parameters(self, job: Job | None) -> dict[str, Any]:
        """The parameters for a job: several devices are as many processes, and what runs on the CPU asks for no GPU."""
        chosen = dict(self.parameters)
        if job is not None and self.kind == "slurm":
            devices, nodes = job.trainer("devices"), job.trainer("num_nodes")
            cpu = job.trainer("accelerator") == "cpu"
            if isinstance(devices, int) and devices > 1:
                chosen["tasks_per_node"] = devices
                if not cpu:
                    chosen["gpus_per_node"] = devices
            if isinstance(nodes, int) and nodes > 1:
                chosen["nodes"] = nodes
            if cpu:
                chosen.pop("gpus_per_node", None)
        prefixed = {key: key if key in COMMON or key.startswith("slurm_") else f"slurm_{key}" for key in chosen}
        return {prefixed[key]: value for key, value in chosen.items()}

    def _remember(self) -> None:
        content = {str(folder): {"id": found.job_id, "key": job.key()} for folder, (job, found) in self.running.items()}
        write_json(self.record, content)

    def _ended(self, submitted: Any) -> bool:
        if self.kind == "local" and submitted._process is None:
            return submitted.paths.result_pickle.is_file() or not _runs_submitit(int(submitted.job_id))
        return bool(submitted.done())

    def _cancel(self, submitted: Any) -> None:
        if self.kind == "slurm":
            submitted.cancel()
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(submitted.job_id), signal.SIGTERM)
        while not self._ended(submitted):
            time.sleep(0.05)

    def _outcome(self, job: Job, submitted: Any) -> Outcome:
        try:
            # a file system of many machines may show the result later: submitit waits for it; here there is no need to
            if self.kind == "local" and not submitted.paths.result_pickle.is_file():
                raise RuntimeError(submitted.stderr() or "its process ended")
            status, seconds, message = submitted.results()[0]
        except Exception as error:  # whatever ended the job, it ends no other one
            state = str(submitted.state) if self.kind == "slurm" else "no result"
            reason = " ".join(str(error).split())[-300:]  # the error stands at the end of a log
            message = f"its job {submitted.job_id} on the cluster ended with {state}: {reason}"
            record_end(job, message)
            return Outcome(job, "failed", 0.0, message)
        return Outcome(job, status, seconds, message)


def _runs_submitit(pid: int) -> bool:
    """Whether a process of this machine is submitit's, and not another one that got its number."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
