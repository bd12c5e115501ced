"""Running one job in its folder, so that it can be killed at any moment.

The folder holds ``stage.json`` from its first moment and ``done.json`` as its last act, both written atomically. A job
that was cut off goes on from its last checkpoint when what it depends on is still the same, else it starts again in an
empty folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from torchlethe import __version__
from torchlethe._cli.errors import UsageError, explain
from torchlethe.study.files import DONE, ERROR, LOG, STARTED, now, read_json, write_json
from torchlethe.study.fingerprints import fingerprint, fingerprints, load_yaml, local_data
from torchlethe.study.keys import Identity, code_has_changed, identify
from torchlethe.study.plan import Job

RunStage = Callable[[str, list[str]], Any]
LINKED = 2**20  # bytes: what is taken over from another study and larger than this is linked, not copied


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


def execute(
    job: Job, run_stage: RunStage, fresh: bool = False, own_process: bool = False, identity: Identity | None = None
) -> Outcome:
    """Run a job, whatever its folder holds.

    Args:
        job: the job; what it needs is done.
        run_stage: runs ``lethe COMMAND WORDS`` and raises when that fails.
        fresh: start again even where a checkpoint would do.
        own_process: whether this process is there for this job alone, so that its file descriptors may be moved.
        identity: what the result depends on, where the process that starts the job knows it: a worker has the code that
            was there when the study began, whatever is on the disk by now.

    Returns:
        The outcome: ``done``, or ``failed`` with the traceback in ``error.txt``.
    """
    identity = identity or identify(job)
    data = fingerprints(_data_of(job))
    cut_off = not fresh and _is_cut_off(job, identity.key, data)
    checkpoint = last_checkpoint(job) if cut_off else None
    spent = 0.0
    if checkpoint:
        spent = max(0.0, checkpoint.stat().st_mtime - float(read_json(job.folder / STARTED).get("began", 0)))
    elif not (cut_off and (job.stage.search is not None or job.stage.command == "predict")):
        # a search and a protection know how to go on in their folder
        clean(job.folder)
    (job.folder / ERROR).unlink(missing_ok=True)
    record: dict[str, Any] = {"command": job.command, "started": now(), "lethe": __version__, "key": identity.key}
    record |= {"parts": dict(identity.parts), "data": data, "began": time.time() - spent}
    write_json(job.folder / STARTED, record)
    begin = time.perf_counter()
    try:
        with captured(job, own_process), _command_line(job):
            try:
                _call(job, run_stage, checkpoint)
            except Exception:
                if checkpoint is None:
                    raise
                sys.stderr.write(f"{traceback.format_exc()}going on from {checkpoint} failed, so it starts again\n")
                clean(job.folder, keep=(LOG,))
                _call(job, run_stage, None)
    except Exception as error:
        (job.folder / ERROR).write_text(traceback.format_exc(), "utf-8")
        message = explain(error)
        if code_has_changed(identity):
            # a worker has the old modules, but signatures for configurations are read from the source
            message += "; the code of torchlethe has changed since the study began: start it again"
        return Outcome(job, "failed", spent + time.perf_counter() - begin, message)
    except SystemExit as stop:  # Lightning turns an interrupt from the keyboard into an exit
        raise KeyboardInterrupt(f"{job.title} stopped ({stop.code})") from stop
    seconds = spent + time.perf_counter() - begin
    finish(job, record, seconds, data)
    return Outcome(job, "done", seconds)


def finish(job: Job, record: dict[str, Any], seconds: float, data: dict[str, str]) -> None:
    """Write ``done.json``: what the job depended on, with the data that its full configuration names."""
    fingerprint.cache_clear()  # the run may have downloaded it
    found = fingerprints({*_data_of(job, job.folder / "config.yaml"), *data})
    record = {name: record[name] for name in ("key", "parts", "command", "lethe")}
    record |= {"seconds": seconds, "finished": now(), "inputs": sorted(job.inputs)}
    write_json(job.folder / DONE, record | {"data": {path: data.get(path, mark) for path, mark in found.items()}})


def _call(job: Job, run_stage: RunStage, checkpoint: Path | None) -> None:
    if job.stage.search is not None:
        from torchlethe.study.search import run_search

        run_search(job, run_stage)
    elif checkpoint is None:
        run_stage(job.stage.command, list(job.words))
    else:
        sys.stderr.write(f"goes on from {checkpoint}\n")
        run_stage(job.stage.command, [*job.words, f"--ckpt_path={checkpoint}"])


def resumed_words(job: Job, fresh: bool = False) -> list[str]:
    """The words of a job with the checkpoint that :func:`execute` would go on from, for its other ranks."""
    cut_off = not fresh and _is_cut_off(job, identify(job).key, fingerprints(_data_of(job)))
    checkpoint = last_checkpoint(job) if cut_off else None
    return [*job.words, *([f"--ckpt_path={checkpoint}"] if checkpoint else [])]


def _data_of(job: Job, config: Path | None = None) -> set[str]:
    """Local data that the words and configuration files of a job name, or its full configuration."""
    exclude = [job.folder, *(need.folder for need in job.needs)]
    found: set[str] = set()
    for path in (config,) if config is not None else job.files:
        if path.is_file():
            found |= local_data(load_yaml(path), exclude)
    for word in () if config is not None else job.template:
        name, _, text = word.removeprefix("--").partition("=")
        value: Any = yaml.safe_load(text) if text[:1] in ("{", "[") else text
        for key in reversed(name.rstrip("+").split(".")):
            value = {key: value}
        found |= local_data(value, exclude)
    return found


def _is_cut_off(job: Job, key: str, data: dict[str, str]) -> bool:
    """Whether the folder holds a part of this very job: a failed job is no part, a killed one is."""
    started = read_json(job.folder / STARTED)
    failed = (job.folder / ERROR).is_file() and not started.get("killed")
    ended = failed or (job.folder / DONE).is_file()
    return not ended and started.get("key") == key and started.get("data") == data


def last_checkpoint(job: Job) -> Path | None:
    """The newest checkpoint in the middle of a job's training.

    None for anything but a fit, for one whose end the configuration does not give (a method that ends by itself), and
    where the training was complete, by its length or by early stopping: going on from there would leave out what
    Lightning does at its end, or train further.
    """
    found = sorted(job.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if job.stage.command != "fit" or job.stage.search is not None or not found or not found[-1].is_file():
        return None
    import torch

    epochs, steps = (job.trainer(option) for option in ("max_epochs", "max_steps"))
    try:
        content = torch.load(found[-1], map_location="cpu", weights_only=True, mmap=True)
        step = int(content["global_step"])
        epoch = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
        stopped = any(map(_has_stopped, content["callbacks"].values()))
    except Exception:  # a damaged file raises whatever its bytes happen to mean
        return None
    limits = [(done, end) for done, end in ((epoch, epochs), (step, steps)) if isinstance(end, int) and end > 0]
    return found[-1] if limits and not stopped and all(done < end for done, end in limits) else None


def _has_stopped(state: Any) -> bool:
    """Whether the state of a callback is that of an EarlyStopping which has ended the training."""
    return isinstance(state, dict) and bool(state.get("stopped_epoch") or state.get("stopping_reason"))


def check_folder(folder: Path) -> bool:
    """Whether a job's folder holds something; refuses one that is not ours."""
    # what starts with a dot is a temporary file of an atomic write that was killed
    used = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if used and not (folder / STARTED).is_file():
        raise UsageError(f"the folder '{folder}' is not empty and is no stage of a study; choose another --output")
    return used


def clean(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Empty a job's folder."""
    if check_folder(folder):
        # first, so that a kill in between leaves neither a half-empty "done" folder nor one to go on in
        (folder / DONE).unlink(missing_ok=True)
        write_json(folder / STARTED, {})
        for path in folder.iterdir():
            if path.name not in (STARTED, *keep):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def adopt(job: Job, source: Path) -> None:
    """Take over an equal job's result from another study's folder; large files are linked where that is possible."""
    done = read_json(source / DONE)
    clean(job.folder)
    write_json(job.folder / STARTED, {"command": job.command, "started": now(), "lethe": __version__})
    for path in sorted(source.rglob("*")):
        target = job.folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.name not in (DONE, STARTED) and not path.name.startswith("."):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if path.stat().st_size < LINKED:
                    raise OSError("small enough to copy")
                os.link(path, target)
            except OSError:
                shutil.copy2(path, target)
    taken = {"parts": dict(identify(job).parts), "command": job.command, "inputs": sorted(job.inputs)}
    write_json(job.folder / DONE, done | taken | {"taken_from": str(source)})


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
def captured(job: Job, own_process: bool = False) -> Iterator[None]:
    """Send what a stage writes and logs to ``log.txt`` in its folder; in its own process also what libraries write."""
    with (job.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:
        log.write(f"$ {job.command}\n")
        if own_process:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
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
