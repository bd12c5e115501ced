"""Stages as jobs of submitit: on this machine, and on a SLURM cluster that is played by three small programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.stages import plan, run_stage, seen
from torchlethe._cli.errors import UsageError
from torchlethe.study import run_jobs

pytest.importorskip("submitit")
from torchlethe.study.cluster import Cluster

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a POSIX shell plays the cluster")

# runs the tasks of an array one after the other in the background, as a cluster with one node would
SBATCH = """#!/bin/sh
echo $$ > cluster/main.pid
cp "$1" "cluster/script.$$"
echo "Submitted batch job $$"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
export SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
(for index in $(seq 0 ${last:-0}); do
    if [ -n "$last" ]; then export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$index; fi
    sh "cluster/script.$$"
done) > /dev/null 2>&1 &
"""
SRUN = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do
    case "$1" in --output|--error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SACCT = "#!/bin/sh\necho 'JobID|State|NodeList'\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]))
    return tmp_path


def test_a_study_on_the_local_executor():
    jobs = plan({"a": {}, "c": {"set": {"do": "die"}}, "b": {"set": {"base": "${c.weights}"}}})
    cluster = Cluster(run_stage, Path("out"), "submitit", {"partition": "gpu"})
    outcomes = run_jobs(jobs, run_stage, launcher=cluster)
    assert {outcome.job.stage.name: outcome.status for outcome in outcomes} == {
        "a": "done",
        "c": "failed",
        "b": "blocked",
    }
    assert seen(jobs[0])["omp"] == "1"
    assert "on the cluster" in outcomes[1].message
    assert "about to die" in (jobs[1].folder / "error.txt").read_text()
    assert json.loads(Path("out/cluster/running.json").read_text()) == {}
    (kept,) = run_jobs(jobs[:1], run_stage, launcher=Cluster(run_stage, Path("out"), "submitit", {}))
    assert kept.status == "kept"


def test_jobs_that_were_submitted_are_found_again(here):
    program = """
from pathlib import Path
from tests.study.stages import plan, run_stage
from torchlethe.study import run_jobs
from torchlethe.study.cluster import Cluster
run_jobs(plan({"a": {"set": {"do": "rest"}}}), run_stage, launcher=Cluster(run_stage, Path("out"), "submitit", {}))
"""
    study = subprocess.Popen([sys.executable, "-c", program])
    record = Path("out/cluster/running.json")
    while not (record.exists() and json.loads(record.read_text())):
        time.sleep(0.01)
    study.send_signal(signal.SIGKILL)
    study.wait()
    (submitted,) = json.loads(record.read_text()).values()
    jobs = plan({"a": {"set": {"do": "rest"}}})
    (outcome,) = run_jobs(jobs, run_stage, launcher=Cluster(run_stage, Path("out"), "submitit", {}))
    assert outcome.status == "done"
    started = {path.name for path in Path("out/cluster").iterdir() if path.is_dir()}
    assert submitted["id"] in started
    assert len([name for name in started if name.isdigit()]) == 1  # it was not submitted twice


def test_seeds_and_shards_are_one_array(here, monkeypatch):
    programs = here / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    Path("cluster").mkdir()
    jobs = plan({"a": {"grid": {"shard": ["0/2", "1/2"]}, "set": {"trainer.accelerator": "cpu"}}}, seeds=(0, 1))
    parameters = {"partition": "long", "timeout_min": 90, "gpus_per_node": 1, "array_parallelism": 3}
    cluster = Cluster(run_stage, Path("out"), "slurm", parameters)
    outcomes = run_jobs(jobs, run_stage, launcher=cluster)
    assert [outcome.status for outcome in outcomes] == ["done"] * 4
    (script,) = Path("cluster").glob("script.*")
    text = script.read_text()
    assert "#SBATCH --array=0-3%3" in text
    assert "#SBATCH --partition=long" in text
    assert "#SBATCH --time=90" in text
    assert "gpus-per-node" not in text  # a stage on the CPU takes none
    pair = plan({"b": {"set": {"trainer.devices": 4, "trainer.num_nodes": 2}}})[0]
    wanted = cluster._parameters(pair)
    assert (wanted["tasks_per_node"], wanted["gpus_per_node"], wanted["nodes"]) == (4, 4, 2)


def test_what_the_cluster_refuses_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"--runner slurm: .*srun"):
        Cluster(run_stage, Path("out"), "slurm", {})
    with pytest.raises(UsageError, match=r"--runner submitit: .*slurm_colour"):
        Cluster(run_stage, Path("out"), "submitit", {"colour": "red"})
