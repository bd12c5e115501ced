"""Stages in worker processes of this machine.

Each stage runs in a process of its own that is a copy of one warm process, where PyTorch and Lightning are imported
already: it starts in some ten milliseconds, and nothing that a stage leaves behind (random state, global switches,
memory) reaches another one. A stage with several devices is started as ``lethe fit …`` by its worker and has the
machine to itself. On a machine with GPUs a stage sees one of them, unless it asks for the CPU or for several.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torchlethe.study.files import ERROR, LOG, STARTED, read_json, write_json, write_text
from torchlethe.study.keys import Identity, identify
from torchlethe.study.plan import Job
from torchlethe.study.runner import Launcher
from torchlethe.study.stage import Outcome, RunStage, execute

WARM = "torchlethe._cli.warm"
LETHE = (sys.executable, "-m", "torchlethe.cli")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# a study inside of a SLURM job starts its processes itself, so Lightning must not take the number of tasks from there
SLURM = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID")
TAIL = 4000  # characters of a log that tell why its process ended


@dataclass(frozen=True)
class Needs:
    """What a job takes of the machine.

    Attributes:
        alone: nothing else may run beside it: it has several devices, or names them itself.
        gpu: it uses one GPU, where there are any.
    """

    alone: bool
    gpu: bool


def needs_of(job: Job) -> Needs:
    """What a job takes, by the options that it gives the Trainer."""
    devices, nodes = job.trainer("devices"), job.trainer("num_nodes")
    one = devices in (None, "auto", 1, "1")
    cpu = job.trainer("accelerator") == "cpu"
    alone = not one or (isinstance(nodes, int) and nodes > 1)
    return Needs(alone, gpu=not cpu and not alone)


def find_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that stages may use, as ``CUDA_VISIBLE_DEVICES`` names them; asks neither PyTorch nor CUDA."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if (program := shutil.which("nvidia-smi", path=environment.get("PATH"))) is None:
        return []
    try:
        found = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found.returncode == 0 else 0
    return [str(index) for index in range(count)]


def count_cores() -> int:
    """The cores that this process may use, by affinity and by the quota of a container."""
    from joblib import cpu_count

    return max(1, cpu_count())


@dataclass
class _Running:
    job: Job
    process: Any
    receiver: Connection
    gpu: str | None
    alone: bool
    begin: float


class Workers(Launcher):
    """Runs jobs in worker processes.

    Args:
        run_stage: as for :class:`~torchlethe.study.runner.Launcher`; a function of a module, as the workers
            get it by name.
        workers: how many jobs run at a time; the cores of this machine by default.
        gpus: names for ``CUDA_VISIBLE_DEVICES``; those of this machine by default.
        threads: of each worker.
        warm: the module that the workers' template imports.
    """

    def __init__(
        self,
        run_stage: RunStage,
        workers: int | None = None,
        gpus: Sequence[str] | None = None,
        threads: int = 1,
        warm: str = WARM,
    ) -> None:
        super().__init__(run_stage)
        self.workers = workers or count_cores()
        self.gpus = list(find_gpus() if gpus is None else gpus)
        self.free = list(self.gpus)
        self.threads = threads
        self.running: list[_Running] = []
        # elsewhere a process that has imported PyTorch must not be copied, so each stage begins with a cold start
        copied = sys.platform.startswith("linux")
        self.context: Any = multiprocessing.get_context("forkserver" if copied else "spawn")
        if copied:
            from multiprocessing import forkserver

            self.context.set_forkserver_preload([warm])
            with _threads_in_environment(threads), _interrupts_ignored():
                forkserver.ensure_running()  # it imports while this process gets ready

    def room(self, job: Job) -> bool:
        """Whether a worker, and a GPU where the job wants one, is free."""
        needs = needs_of(job)
        if needs.alone:
            return not self.running
        if any(running.alone for running in self.running) or len(self.running) >= self.workers:
            return False
        return not needs.gpu or not self.gpus or bool(self.free)

    def start(self, job: Job, fresh: bool = False) -> None:
        """Start a worker for a job."""
        needs = needs_of(job)
        gpu = self.free.pop(0) if needs.gpu and self.gpus else None
        environment = {name: value for name, value in os.environ.items() if name not in THREADS + SLURM}
        environment |= dict.fromkeys(THREADS, str(self.threads))
        if self.gpus and not needs.alone:
            environment["CUDA_VISIBLE_DEVICES"] = gpu or ""
        receiver, sender = self.context.Pipe(duplex=False)
        arguments = (sender, job, identify(job), self.run_stage, fresh, environment, self.threads, needs.alone)
        process = self.context.Process(target=_work, args=arguments, name=job.title)
        process.start()
        sender.close()
        self.running.append(_Running(job, process, receiver, gpu, needs.alone, time.perf_counter()))

    def wait(self) -> list[Outcome]:
        """Wait until at least one worker has ended."""
        ready = multiprocessing.connection.wait([running.process.sentinel for running in self.running])
        ended = [running for running in self.running if running.process.sentinel in ready]
        self.running = [running for running in self.running if running not in ended]
        outcomes = []
        for running in ended:
            running.process.join()
            if running.gpu is not None:
                self.free.append(running.gpu)
            outcomes.append(self._outcome(running))
        return outcomes

    def _outcome(self, running: _Running) -> Outcome:
        job, seconds = running.job, time.perf_counter() - running.begin
        _kill_group(running.process.pid)  # what it started must not outlive it
        try:
            status, seconds, message = running.receiver.recv()
        except (EOFError, OSError):
            message = how_it_ended(running.process.exitcode)
            record_end(job, message)
            status = "failed"
        finally:
            running.receiver.close()
        return Outcome(job, status, seconds, message)

    def stop(self) -> None:
        """Kill the workers that still run; their jobs go on from their last checkpoints the next time."""
        for running in self.running:
            running.process.kill()
            _kill_group(running.process.pid)
        for running in self.running:
            running.process.join()
            running.receiver.close()
        self.running = []


def how_it_ended(exitcode: int | None) -> str:
    """Why a process ended without a word, as a sentence."""
    if exitcode is not None and exitcode < 0:
        known = -exitcode in set(signal.Signals)  # real-time signals have no names
        name = signal.Signals(-exitcode).name if known else f"signal {-exitcode}"
        reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{reason}."
    return f"its process ended with the status {exitcode} before the stage was over."


def record_end(job: Job, message: str) -> None:
    """Leave what is known about a job whose process ended without a word: a sentence and the end of its log."""
    log = job.folder / LOG
    text = log.read_text("utf-8", errors="replace")[-TAIL:] if log.is_file() else ""
    if started := read_json(job.folder / STARTED):
        write_json(job.folder / STARTED, started | {"killed": message})  # it may go on from its checkpoint
        write_text(job.folder / ERROR, f"{message}\n\nThe end of {LOG}:\n\n{text}")


def _work(
    sender: Connection,
    job: Job,
    identity: Identity,
    run_stage: RunStage,
    fresh: bool,
    environment: Mapping[str, str],
    threads: int,
    alone: bool,
) -> None:
    """Run one job in a worker process and send what became of it."""
    if hasattr(os, "setsid"):
        os.setsid()  # the terminal's Ctrl-C is for the study, which ends its workers
    with contextlib.suppress(OSError):  # when memory runs out, a stage should go and not the study
        Path("/proc/self/oom_score_adj").write_text("500")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    if not alone and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    try:
        outcome = execute(job, in_subprocess if alone else run_stage, fresh, own_process=True, identity=identity)
        sender.send((outcome.status, outcome.seconds, outcome.message[:TAIL]))
    except KeyboardInterrupt as stop:
        sender.send(("failed", 0.0, str(stop)))


def in_subprocess(command: str, words: list[str]) -> None:
    """Run ``lethe COMMAND WORDS`` as a command, which Lightning's launcher can repeat for the other ranks."""
    found = subprocess.run([*LETHE, command, *words], check=False, stdin=subprocess.DEVNULL)
    if found.returncode:
        how = how_it_ended(found.returncode) if found.returncode < 0 else f"see {LOG}."
        raise RuntimeError(f"lethe {command} ended with the status {found.returncode}: {how}")


def _die_with(sentinel: int) -> None:
    """End this process and what it started when the study's process is gone, however that ended."""
    multiprocessing.connection.wait([sentinel])
    _kill_group(os.getpid())
    os._exit(1)


def _kill_group(leader: int) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


@contextlib.contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let a process that is started here ignore Ctrl-C, which is for the study."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
