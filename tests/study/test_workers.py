"""Stages in worker processes: side by side, apart from each other, and gone when they should be."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.stages import plan, run_stage, seen
from torchlethe.study import run_jobs
from torchlethe.study.stage import execute
from torchlethe.study.workers import Workers, find_gpus, needs_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes are forked")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(jobs, workers=2, **options):
    outcomes = run_jobs(jobs, run_stage, launcher=Workers(run_stage, workers, **{"gpus": [], **options}))
    return {outcome.job.folder.as_posix(): outcome for outcome in outcomes}


def test_stages_run_side_by_side_with_one_thread_each():
    jobs = plan({"a": {"set": {"do": "meet"}}, "b": {"set": {"base": "${a.weights}"}}}, seeds=(0, 1))
    assert {outcome.status for outcome in run(jobs).values()} == {"done"}
    found = [seen(job) for job in jobs]
    assert len({process["pid"] for process in found}) == 4
    assert {(process["omp"], process["torch"]) for process in found} == {("1", True)}  # warm: imported before the fork
    assert {process["cuda_refused"] for process in found} == {False}
    assert json.loads((jobs[2].folder / "weights.safetensors").read_text())["base"]
    assert {outcome.status for outcome in run(jobs).values()} == {"kept"}


def test_where_processes_are_not_copied_stages_start_cold(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    (job,) = plan({"a": {}})
    (outcome,) = run([job]).values()
    assert outcome.status == "done"
    assert (seen(job)["torch"], seen(job)["omp"]) == (False, "1")


def test_nothing_of_a_stage_reaches_the_next():
    outcomes = run(plan({"a": {"set": {"do": "global"}}}, seeds=(0, 1, 2)), workers=1)
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 3


def test_a_killed_worker_fails_only_its_stage():
    jobs = plan({"a": {"set": {"do": "die"}}, "b": {"set": {"base": "${a.weights}"}}, "c": {"set": {"do": "rest"}}})
    outcomes = run(jobs)
    assert {folder.split("/")[1]: outcome.status for folder, outcome in outcomes.items()} == {
        "a": "failed",
        "b": "blocked",
        "c": "done",
    }
    message = outcomes["out/a/all/seed-0"].message
    assert message == "its process was ended by SIGKILL, as the system does when memory runs out."
    error = Path("out/a/all/seed-0/error.txt").read_text()
    assert message in error
    assert "about to die" in error
    Path("out/mercy").touch()
    assert [outcome.status for outcome in run(jobs).values()] == ["done", "done", "kept"]
    assert not Path("out/a/all/seed-0/error.txt").exists()


def test_workers_die_with_the_study(tmp_path):
    program = """
from tests.study.stages import plan, run_stage
from torchlethe.study import run_jobs
from torchlethe.study.workers import Workers
if __name__ == "__main__":
    run_jobs(plan({"a": {"set": {"do": "linger"}}}), run_stage, launcher=Workers(run_stage, 1, gpus=[], warm="json"))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    study = subprocess.Popen([sys.executable, "-c", program], env=environment)
    told = tmp_path / "out" / "a" / "all" / "seed-0" / "pid"
    try:
        pid = int(_until(lambda: told.exists() and told.read_text()))
        os.kill(pid, 0)
    finally:
        study.kill()
        study.wait()
    _until(lambda: not _is_alive(pid))


def test_a_stage_per_gpu():
    jobs = plan(
        {"a": {"set": {"do": "rest"}}, "c": {"set": {"trainer.accelerator": "cpu"}}},
        seeds=range(4),
    )
    assert {outcome.status for outcome in run(jobs, workers=4, gpus=["0", "GPU-7"]).values()} == {"done"}
    spans = {}
    for job in jobs[:4]:
        began = json.loads((job.folder / "began.json").read_text())
        spans.setdefault(seen(job)["gpu"], []).append((began, seen(job)["time"]))
    assert spans.keys() == {"0", "GPU-7"}
    for times in spans.values():
        times.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))
    assert {seen(job)["gpu"] for job in jobs[4:]} == {""}


def test_which_gpus_there_are(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: x)'; echo '  MIG 1g'; echo 'GPU 1: H100 (UUID: y)'\n")
    program.chmod(0o755)
    assert find_gpus({"PATH": str(tmp_path)}) == ["0", "1"]
    assert find_gpus({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3, MIG-5"}) == ["3", "MIG-5"]
    assert find_gpus({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}) == []
    assert find_gpus({"PATH": ""}) == []


def test_what_a_stage_takes_of_the_machine():
    Path("two.yaml").write_text("trainer: {devices: 2, accelerator: cpu}\n")
    jobs = plan(
        {
            "plain": {},
            "cpu": {"set": {"trainer.accelerator": "cpu"}},
            "file": {"config": ["two.yaml"]},
            "back": {"config": ["two.yaml"], "set": {"trainer.devices": 1}},
            "nodes": {"set": {"trainer.num_nodes": 2}},
            "named": {"set": {"trainer.devices": [3]}},
        }
    )
    found = {job.stage.name: needs_of(job) for job in jobs}
    assert [name for name, needs in found.items() if needs.alone] == ["file", "nodes", "named"]
    assert [name for name, needs in found.items() if needs.gpu] == ["plain"]
    workers = Workers(run_stage, 2, gpus=[])
    assert workers.room(jobs[2])
    workers.start(jobs[0])
    assert not workers.room(jobs[2])  # it waits until the machine is free
    assert workers.room(jobs[1])
    workers.wait()


def test_two_devices_run_as_a_command_of_their_own(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")  # as in a SLURM job that holds the whole study
    words = {
        "model": "Classifier",
        "model.network": {
            "class_path": "SmallCNN",
            "init_args": {"num_classes": 10, "in_channels": 1, "image_size": 8},
        },
        "model.num_classes": 10,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "data": "DigitsDataModule",
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.enable_checkpointing": False,
    }
    (job,) = plan({"pair": {"set": words}}, defaults={"set": {"seed_everything": "${seed}"}})
    (outcome,) = run([job]).values()
    log = (job.folder / "log.txt").read_text()
    assert outcome.status == "done", log
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in log
    assert (job.folder / "weights.safetensors").is_file()


def test_a_stage_that_cannot_be_reached_by_the_workers_still_runs_here():
    (job,) = plan({"a": {}})
    assert execute(job, run_stage).status == "done"


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _until(condition, seconds=60):
    for _ in range(seconds * 20):
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError("waited too long")


def test_a_study_that_is_interrupted_ends_its_workers():
    (job,) = plan({"a": {"set": {"do": "linger"}}})
    workers = Workers(run_stage, 1, gpus=[])
    workers.start(job)
    told = job.folder / "pid"
    pid = int(_until(lambda: told.exists() and told.read_text()))
    workers.stop()
    assert not _is_alive(pid)
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
