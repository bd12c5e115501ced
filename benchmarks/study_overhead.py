"""Seconds that a study spends per trivial stage: 100 fits of one step on digits, in worker processes.

The study has one stage with a grid of a hundred values and is run twice: the second run has nothing to do. The report
is not part of the measurement, the start of the workers is.

    python benchmarks/study_overhead.py --stages 100 --workers 2
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import yaml

from torchlethe._cli.catalog import configs_folder
from torchlethe.cli import _run_stage
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.workers import Workers, count_cores


def main() -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=100)
    parser.add_argument("--workers", type=int, default=None, help="the cores of this machine by default")
    options = parser.parse_args()
    digits = configs_folder().resolve() / "digits"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        content = {
            "stages": {
                "fit": {
                    "config": [os.path.relpath(digits / name, folder) for name in ("data.yaml", "original.yaml")],
                    "set": {"trainer.max_steps": 1, "trainer.enable_checkpointing": False},
                    "grid": {
                        "model.init_args.optimizer.init_args.lr": [0.01 + n / 1000 for n in range(options.stages)]
                    },
                }
            }
        }
        path.write_text(yaml.safe_dump(content))
        workers = options.workers or count_cores()
        begin = time.perf_counter()
        jobs = plan_jobs(load_study(path), Path(folder) / "out")
        outcomes = run_jobs(jobs, _run_stage, launcher=Workers(_run_stage, workers, gpus=[]))
        first = time.perf_counter() - begin
        if failed := [outcome for outcome in outcomes if outcome.status != "done"]:
            raise SystemExit(f"{len(failed)} stages did not run: {failed[0].message}")
        begin = time.perf_counter()
        again = run_jobs(plan_jobs(load_study(path), Path(folder) / "out"), _run_stage)
        second = time.perf_counter() - begin
    inside = statistics.median(outcome.seconds for outcome in outcomes)
    print(f"{platform.machine()}, {count_cores()} cores, {workers} workers, {len(outcomes)} stages of one step")
    print(f"{first:7.1f} s in all: {first / len(outcomes):.2f} s per stage (median inside a stage {inside:.2f} s)")
    print(f"{second:7.2f} s for a second run, which kept {sum(o.status == 'kept' for o in again)}")


if __name__ == "__main__":
    main()
