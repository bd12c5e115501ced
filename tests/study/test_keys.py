"""What makes a result count no longer: code of the user, data; and results that another study has."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.study.stages import plan, run_stage
from torchlethe.study import run_jobs
from torchlethe.study.fingerprints import fingerprint, local_data
from torchlethe.study.keys import code_version, identify, module_version
from torchlethe.study.runner import STUDY, Shelf, why, write_json


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forget()
    yield tmp_path
    forget()


def forget():
    """What a process remembers of files and modules; every study is a process of its own."""
    fingerprint.cache_clear()
    module_version.cache_clear()
    importlib.invalidate_caches()


def reasons(jobs):
    forget()
    return {job.stage.name: why(job) for job in jobs}


def test_modules_of_the_user_count(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    Path("my_method.py").write_text("import my_helper\nclass Mine: ...\n")
    Path("my_helper.py").write_text("alpha = 1\n")
    Path("unrelated.py").write_text("")

    def study():
        return plan({"a": {"set": {"model": "my_method.Mine"}}, "b": {"set": {"model": "torch.nn.Identity"}}})

    run_jobs(study(), run_stage)
    Path("unrelated.py").write_text("changed = 1\n")
    assert reasons(study()) == {"a": "", "b": ""}
    Path("my_helper.py").write_text("alpha = 2\n")
    assert reasons(study()) == {"a": "the code of my_method changed", "b": ""}


def test_code_counts_where_it_can_change_a_result(here, monkeypatch):
    monkeypatch.setattr("torchlethe.study.keys.PACKAGE", here / "package")
    names = ("updates/sfron.py", "_cli/lightning.py", "_cli/errors.py", "hub/card.py", "evaluate.py", "study/search.py")
    for name in names:
        (here / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "package" / name).write_text("")
    (here / "package/study/search_space.py").touch()

    def versions():
        code_version.cache_clear()
        return code_version(), code_version(search=True)

    counted = {}
    for name in names:
        before = versions()
        (here / "package" / name).write_text("changed")
        counted[name] = tuple(old != new for old, new in zip(before, versions(), strict=True))
    assert {name for name, found in counted.items() if found == (True, True)} == set(names[:2])
    assert {name for name, found in counted.items() if found == (False, True)} == {"study/search.py"}
    assert {name for name, found in counted.items() if found == (False, False)} == set(names[2:5])


def test_installed_packages_count_by_version():
    assert module_version("numpy") == np.__version__


def test_changed_data_reruns(here):
    data = here / "images"
    data.mkdir()
    for name in ("a.png", "b.png"):
        (data / name).write_text(name)
    Path("forget.json").write_text("[1, 2]")
    sets = {"data.init_args.root": "images", "data.init_args.forget": {"init_args": {"indices": "forget.json"}}}

    def study():
        return plan({"a": {"set": sets}, "b": {"set": {"alpha": 1}}})

    run_jobs(study(), run_stage)
    os.utime(data / "a.png", (1, 1))  # a copy with other times is the same data
    assert reasons(study()) == {"a": "", "b": ""}
    (data / "a.png").write_text("x")
    assert reasons(study()) == {"a": "its data changed: images", "b": ""}
    (data / "a.png").write_text("a.png")
    Path("forget.json").write_text("[1, 3]")
    assert reasons(study())["a"] == "its data changed: forget.json"
    Path("forget.json").write_text("[1, 2]")
    (data / "c.png").touch()
    assert reasons(study())["a"] == "its data changed: images"


def test_data_of_a_default_argument_counts_too(here):
    Path("pictures").mkdir()
    Path("pictures/a.png").write_text("a")

    def stage(command, words):
        run_stage(command, words)
        folder = Path(next(word for word in words if "default_root_dir" in word).partition("=")[2])
        (folder / "config.yaml").write_text("data: {class_path: Pictures, init_args: {root: pictures}}\n")

    run_jobs(plan({"a": {}}), stage)
    assert reasons(plan({"a": {}})) == {"a": ""}
    Path("pictures/a.png").write_text("b")
    assert reasons(plan({"a": {}})) == {"a": "its data changed: pictures"}


def test_what_counts_as_data(here):
    for name in ("data/cifar-10-batches-py", "data/other", "cache", "cpu", "models/net"):
        Path(name).mkdir(parents=True)
    Path("weights.pt").touch()
    content = {
        "data": {"class_path": "CIFAR10DataModule", "init_args": {"root": "data", "cache_dir": "cache"}},
        "model": {"weights": "weights.pt", "network": "models/net", "url": "https://a/b", "name": "net.yaml"},
        "trainer": {"accelerator": "cpu", "default_root_dir": "models"},
    }
    # of a folder that several data sets share, only the own files
    assert local_data(content) == {"data/cifar-10-batches-py", "weights.pt", "models/net"}
    assert local_data({"data": {"root": str(here)}}) == set()  # it holds everything, the results too
    assert local_data(content, exclude=[Path("models")]) == {"data/cifar-10-batches-py", "weights.pt"}


def test_large_folders_count_by_size_and_time(here):
    data = here / "many"
    data.mkdir()
    for number in range(70):
        (data / str(number)).write_text("a")
    before = fingerprint("many")
    os.utime(data / "3", (1, 1))
    fingerprint.cache_clear()
    assert fingerprint("many") != before


STAGES = {"base": {"set": {"size": 1}}, "top": {"set": {"base": "${base.weights}"}}}
RENAMED = {"root": {"set": {"size": 1}}, "leaf": {"set": {"base": "${root.weights}"}}, "new": {"set": {"size": 2}}}


def test_two_studies_share_equal_stages():
    first = plan(STAGES, output="runs/first")
    run_jobs(first, run_stage, root=Path("runs/first"))
    write_json(Path("runs/first") / STUDY, {})
    calls = []

    def stage(command, words):
        calls.append(words)
        run_stage(command, words)

    second = plan(RENAMED, output="runs/second")
    Path("runs/second").mkdir()
    outcomes = run_jobs(second, stage, root=Path("runs/second"))
    assert [outcome.status for outcome in outcomes] == ["kept", "kept", "done"]
    assert "runs/first/base" in outcomes[0].message
    assert len(calls) == 1
    for mine, other in zip(second, first, strict=False):
        weights = "weights.safetensors"
        assert (mine.folder / weights).read_text() == (other.folder / weights).read_text()
        assert json.loads((mine.folder / "done.json").read_text())["command"] == mine.command
    assert {why(job) for job in second} == {""}
    # what was taken over is a result like any other: it outlives the study that it came from
    import shutil

    shutil.rmtree("runs/first")
    assert {outcome.status for outcome in run_jobs(second, stage, root=Path("runs/second"))} == {"kept"}


def test_a_result_on_other_data_is_not_taken_over(here):
    Path("images").mkdir()
    Path("images/a").write_text("a")
    stages = {"a": {"set": {"data.root": "images"}}}
    run_jobs(plan(stages, output="runs/first"), run_stage)
    write_json(Path("runs/first") / STUDY, {})
    (job,) = plan(stages, output="runs/second")
    job.folder.mkdir(parents=True)
    assert Shelf(Path("runs/second")).find(job) == Path("runs/first/a/all/seed-0").resolve()
    Path("images/a").write_text("b")
    forget()
    assert Shelf(Path("runs/second")).find(job) is None


def test_keys_do_not_depend_on_names_and_places():
    keys = {identify(plan(STAGES, output=output)[0]).key for output in ("one", "/tmp/two")}
    assert keys == {identify(plan(RENAMED)[0]).key}
    assert len({identify(job).key for job in plan({"a": {"set": {"size": 1}}, "b": {"set": {"size": 2}}})}) == 2
