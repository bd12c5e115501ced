"""The digits study as a user runs it: killed at random moments, broken, edited; the same command, the same table."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.study.digits import enter, small_study, write
from torchlethe.cli import _run_stage, main
from torchlethe.study import load_study, plan_jobs, run_jobs
from torchlethe.study.command import alone
from torchlethe.study.workers import Workers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes are forked")
TIMES = ("seconds", "speed_up")
METRICS = ["forget_acc", "forget_accuracy", "of_my_own"]
OPTIONS = ("--output", "out", "--workers", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study that was left in peace, and what the command said."""
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    enter(folder)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            write(small_study() | {"metrics": METRICS})
            assert main(["study", "study.yaml", *OPTIONS]) == 0
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=folder / "out", said=said.getvalue())


def numbers(root):
    """What the runs measured, but for the time they took."""
    found = {}
    for path in sorted(Path(root).rglob("evaluation.json")):
        values = json.loads(path.read_text())
        values.pop("meta")
        place = path.relative_to(root).as_posix()
        found[place] = {key: value for key, value in values.items() if not any(part in key for part in TIMES)}
    return found


def done():
    return len(list(Path("two").rglob("done.json")))


def the_command():
    """``lethe study`` as a user starts it."""
    command = [
        sys.executable,
        "-m",
        "torchlethe.cli",
        *["study", "study.yaml", "--workers", "2", "--output", "two/killed"],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stages_here():
    """The same stages one after the other in one process, which a kill hits in the middle of one; a warm start."""
    process = Workers(_run_stage, 1, gpus=[]).context.Process(target=run_stages_here)
    process.start()
    return process


def run_stages_here():
    run_jobs(plan_jobs(load_study("study.yaml"), "two/killed"), _run_stage)


def kill(process, count, seconds):
    """Send SIGKILL some seconds after so many stages are done, and one more has begun."""
    begin = time.monotonic()
    while done() < count or not list(Path("two").rglob("stage.json")):
        assert time.monotonic() < begin + 120, "the study does not get on"
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def test_a_study_killed_at_three_random_points_ends_the_same(digits, finished):
    chance = random.Random(time.time_ns())
    counts = sorted(chance.sample(range(5), 3))
    seen = []
    for start, count in zip(chance.sample([the_command, stages_here, stages_here], 3), counts, strict=True):
        kill(start(), count, chance.uniform(0, 1))
        seen.append((start.__name__, count, done()))
    assert main(["study", "study.yaml", "--output", "two/killed", "--workers", "2"]) == 0
    assert numbers("two/killed") == numbers(finished.folder), seen
    assert len(numbers(finished.folder)) == 4
    for name in ("table.md", "table.csv", "report.html"):
        assert (Path("two/killed") / name).is_file()


def test_what_the_command_leaves(finished):
    assert "5 stages run, 0 kept, 0 failed" in finished.said
    assert finished.said.startswith(
        "note: 'metrics' names what the catalogue lacks: 'forget_acc'; did you mean 'forget_accuracy'"
    )
    assert "writing the report\n" in finished.said
    assert finished.said.rstrip().endswith("report  out/report.html\nnot measured: forget_acc, of_my_own")
    out = finished.folder
    table = (out / "table.md").read_text()
    assert "## Forget one class" in table  # the only request, but its title says what it was
    for method in ("Original", "Retrain", "FineTune", "SFRon"):
        assert f"| {method} |" in table
    html = (out / "report.html").read_text()
    assert "lethe study study.yaml --output out" in html
    assert str(out.parent) not in html  # nothing of the machine
    assert {"bars.pdf", "bars.png", "confidence.pdf", "pareto.png"} <= {
        path.name for path in (out / "figures").iterdir()
    }
    assert r"\begin{tabular}" in (out / "table.tex").read_text()
    assert (out / "table.csv").read_text().count("\n") > 20


def test_a_dry_run_writes_nothing(digits, capfd):
    assert main(["study", "study.yaml", "--dry-run"]) == 0
    assert capfd.readouterr().out.endswith("\n5 of 5 stages would run\n")
    assert not Path("runs").exists()


def test_a_second_run_leaves_the_report_alone(digits, finished, capfd):
    shutil.copytree(finished.folder, "out")
    report = Path("out/report.html")
    write(small_study() | {"metrics": METRICS})
    written = report.stat().st_mtime_ns
    assert main(["study", "study.yaml", *OPTIONS]) == 0
    said = capfd.readouterr().err
    assert "0 stages run, 5 kept" in said
    assert said.endswith("not measured: forget_acc, of_my_own\n")
    assert report.stat().st_mtime_ns == written
    write(small_study() | {"name": "Another title"})
    assert main(["study", "study.yaml", *OPTIONS]) == 0
    assert "0 stages run, 5 kept" in capfd.readouterr().err
    assert "Another title" in report.read_text()


def test_results_of_another_study_are_not_overwritten(digits, finished, capfd):
    shutil.copytree(finished.folder, "out")
    page = Path("out/report.html").read_bytes()
    write(small_study() | {"name": "Another title"})
    Path("study.yaml").rename("other.yaml")
    for more in ([], ["--dry-run"]):
        assert main(["study", "other.yaml", "--output", "out", *more]) == 2
        error = capfd.readouterr().err
        assert "'out' holds the results of the study 'Forgetting handwritten digits' (../study.yaml)" in error
        assert "choose another --output" in error
    assert Path("out/report.html").read_bytes() == page
    write(small_study() | {"metrics": METRICS})
    Path("study.yaml").rename("other.yaml")  # the same study, renamed
    assert main(["study", "other.yaml", "--output", "out"]) == 0
    Path("out/study.json").unlink()
    assert main(["study", "other.yaml", "--output", "out"]) == 2
    assert "holds a report.html that is not of this study" in capfd.readouterr().err


def test_what_is_wrong_is_one_sentence_before_work(digits, capfd, monkeypatch):
    Path("afile").write_text("mine")
    for words, sentence in (
        (["--output", "afile"], "--output is 'afile', which is a file; choose a folder"),
        (["--output", "afile/x/y"], f"--output is 'afile/x/y' below '{Path('afile').absolute()}', which is a file"),
        (
            ["--slurm", "partition=gpu"],
            "--slurm is 'partition=gpu', but stages run on this machine; add --runner slurm",
        ),
        (["--runner", "slurm", "--slurm", "gpu"], "--slurm is 'gpu', but must be KEY=VALUE"),
    ):
        for more in ([], ["--dry-run"]):
            assert main(["study", "study.yaml", *words, *more]) == 2
            assert f"lethe study: error: {sentence}" in capfd.readouterr().err
    write(small_study() | {"output": "afile"})
    assert main(["study", "study.yaml"]) == 2
    assert "study.yaml: 'output' is 'afile', which is a file" in capfd.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["study", "study.yaml", "--output", "out"]) == 2
    assert f"--output is 'out', but '{Path.cwd()}' is not writable" in capfd.readouterr().err
    assert not Path("out").exists()


def test_a_typo_in_any_stage_stops_the_study_before_work(digits, finished, capfd):
    content = small_study()
    content["stages"]["sfron"]["set"]["model.init_args.alhpa"] = 3
    content["stages"]["fine_tune"]["set"]["trainer.max_epochs"] = "many"
    content["stages"]["tuned"] = {"config": ["fine_tune.yaml", "${tune.best}"]}  # which is not there yet
    content["stages"]["tune"] = {
        "per": ["seed"],
        "config": ["data.yaml", "original.yaml"],
        "search": {"metric": "val_loss", "space": {"model.init_args.optimizer.init_args.lrr": [1]}, "sampler": "grid"},
    }
    write(content)
    assert main(["study", "study.yaml", "--output", "out"]) == 2
    said = capfd.readouterr().err
    wrong = [line for line in said.splitlines() if line.startswith("wrong ")]
    assert len(wrong) == 3, said
    assert "sfron · Forget one class: --model.alhpa: SFRon has no argument 'alhpa'; did you mean 'alpha'?" in said
    assert "fine_tune · Forget one class: --trainer.max_epochs" in said
    assert "wrong tune: " in said
    assert "'lrr'" in said
    assert said.endswith("nothing was run\n")
    assert not list(Path("out").rglob("stage.json"))


def test_one_study_at_a_time_in_a_folder(digits, capfd):
    with alone(Path("out")):
        assert main(["study", "study.yaml", "--output", "out"]) == 2
    assert "another study is writing to 'out'" in capfd.readouterr().err
    with alone(Path("out")):
        assert not list(Path("out").glob("*.json"))


def test_a_broken_stage_and_an_edited_one(digits, finished, capfd):
    def run(*words, expected=0):
        assert main(["study", "study.yaml", *words]) == expected
        return "".join(capfd.readouterr())

    shutil.copytree(finished.folder, "out")
    content = small_study()
    content["stages"]["sfron"]["set"]["model.init_args.steps"] = -1
    write(content)
    error = run("--output", "out", "--no-reuse", expected=1)
    assert "0 stages run, 4 kept, 1 failed" in error
    assert "failed sfron · Forget one class · seed 3: steps is -1" in error
    assert "(see out/sfron/one_class/seed-3/error.txt)" in error
    assert "Traceback" in Path("out/sfron/one_class/seed-3/error.txt").read_text()
    page = Path("out/report.html").read_text()
    assert "steps is -1" in page
    assert "Traceback" in page
    write(small_study())  # repaired: only this stage runs
    error = run("--output", "out", "--dry-run", "--no-reuse")
    assert "run   sfron · Forget one class · seed 3  it failed the last time" in error
    assert "1 of 5 stages would run" in error
    assert "1 stages run, 4 kept, 0 failed" in run("--output", "out", "--no-reuse")
    assert numbers("out") == numbers(finished.folder)
    Path("fine_tune.yaml").write_text(Path("fine_tune.yaml").read_text().replace("0.01", "0.02"))
    error = run("--output", "out", "--dry_run")
    assert "run   fine_tune · Forget one class · seed 3  the file fine_tune.yaml changed" in error
    assert "1 of 5 stages would run" in error
    # another study has the same stages: what is done here need not run there
    error = run("--output", "other", "--dry-run")
    assert "take  original · seed 3  from" in error
    assert "run   fine_tune" in error
    assert "\n5 of 5 stages would run" in run("--output", "other", "--dry-run", "--no-reuse")
    assert "\nat most 4 of 5 stages would run" in run("--output", "other", "--dry-run", "--force", "retrain")
    content = small_study()
    content["stages"]["original"]["set"]["model.init_args.label_smoothing"] = 2
    write(content)
    error = run("--output", "third", "--no-reuse", expected=1)
    assert "1 stages run, 0 kept, 1 failed, 3 blocked by them" in error


def test_planning_needs_no_torch(digits, finished):
    shutil.copytree(finished.folder, "out")
    code = (
        "import sys; from torchlethe.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    for words, content in ((OPTIONS, {"metrics": METRICS}), (["--output", "other", "--dry-run"], {})):
        write(small_study() | content)
        subprocess.run([sys.executable, "-c", code, "study", "study.yaml", *words], check=True, timeout=60)
