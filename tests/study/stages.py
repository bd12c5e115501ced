"""Stages that worker processes can run: what they do is said by their options."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from torchlethe.study import load_study, plan_jobs

WAIT = 60


def run_stage(command, words):
    """Write the options as weights; on the way do what ``do`` says."""
    options = dict(word[2:].split("=", 1) for word in words if not word.startswith("--config"))
    folder = Path(options.pop("trainer.default_root_dir"))
    content = {key: value for key, value in options.items() if not key.startswith(("trainer", "do"))}
    getattr(sys.modules[__name__], f"do_{options.get('do', 'nothing')}")(folder)
    if "base" in options:
        content["base"] = Path(options["base"]).read_text()
    seen = {"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "omp": os.environ["OMP_NUM_THREADS"]}
    seen |= {"torch": "torch" in sys.modules, "time": time.time()}
    if seen["torch"]:  # whether CUDA refuses to start here, as it does in the fork of a process that asked for it
        seen["cuda_refused"] = sys.modules["torch"].cuda._is_in_bad_fork()
    (folder / "seen.json").write_text(json.dumps(seen))
    (folder / "weights.safetensors").write_text(json.dumps(content))


def do_nothing(folder):
    """An honest stage."""


def do_meet(folder):
    """Wait for the other seed's stage, which only comes when both run at the same time."""
    (folder / "here").touch()
    other = folder.with_name({"seed-0": "seed-1", "seed-1": "seed-0"}[folder.name])
    for _ in range(WAIT * 20):
        if (other / "here").exists():
            return
        time.sleep(0.05)
    raise TimeoutError("the other stage never came")


def do_global(folder):
    """Change what every stage of a process sees, unless another stage has."""
    import torch

    if torch.get_default_dtype() != torch.float32:
        raise RuntimeError("met what another stage left behind")
    torch.set_default_dtype(torch.float64)


def do_die(folder):
    """End as a process does that the system kills."""
    if not (folder.parents[2] / "mercy").exists():
        sys.stderr.write("about to die\n")
        os.kill(os.getpid(), signal.SIGKILL)


def do_linger(folder):
    """Say which process this is, and stay."""
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(WAIT)


def do_rest(folder):
    """Take a moment."""
    (folder / "began.json").write_text(json.dumps(time.time()))
    time.sleep(0.3)


def plan(stages, output="out", seeds=(0,), **more):
    """Jobs of a study with these stages in the working directory."""
    content = {"seeds": list(seeds), "defaults": {"set": {"seed": "${seed}"}}, "stages": stages, **more}
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return plan_jobs(load_study("study.yaml"), output)


def seen(job):
    """What a finished stage saw of its process."""
    return json.loads((job.folder / "seen.json").read_text())
