"""One row for each combination of settings."""

from pathlib import Path

import pytest

from tests.study.stages import plan
from torchlethe._cli.errors import UsageError
from torchlethe.study import load_study

ALPHAS = {"method": "SFRon", "grid": {"model.alpha": [1, 0.5], "model.mask": ["on"]}, "set": {"model.alpha": 9}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_point_is_a_row_with_its_own_folder():
    jobs = plan({"sfron": ALPHAS, "plain": {"method": "Plain"}}, seeds=(0, 1))
    assert [job.folder.as_posix() for job in jobs[:2]] == [
        "out/sfron/alpha=1,mask=on/all/seed-0",
        "out/sfron/alpha=1,mask=on/all/seed-1",
    ]
    assert [job.title for job in jobs[2:3]] == ["sfron (alpha=0.5, mask=on) · all · seed 0"]
    assert {"--model.alpha=0.5", "--model.mask=on"} <= set(jobs[2].words)
    assert "--model.alpha=9" not in jobs[2].words
    rows = ["SFRon (alpha=1, mask=on)", "SFRon (alpha=0.5, mask=on)", "Plain"]
    assert list(load_study("study.yaml").methods) == rows
    assert len({job.key() for job in jobs[::2]}) == 3


def test_what_needs_a_grid_follows_its_points():
    jobs = plan(
        {
            "original": {"per": ["seed"], "grid": {"trainer.max_epochs": [1, 2]}},
            "retrain": {"method": "Retrain"},
            "sfron": {"method": "SFRon", "set": {"w": "${original.weights}"}, "grid": {"alpha": [3, 5]}},
            "judge": {"method": "J", "set": {"a": "${sfron.weights}", "b": "${original.weights}"}},
        }
    )
    by_folder = {job.folder.as_posix(): job for job in jobs}
    assert len(jobs) == 2 + 1 + 4 + 4
    job = by_folder["out/judge/max_epochs=2,alpha=5/all/seed-0"]
    assert job.stage.method == "J (max_epochs=2, alpha=5)"
    assert "--a=out/sfron/max_epochs=2,alpha=5/all/seed-0/weights.safetensors" in job.words
    assert "--b=out/original/max_epochs=2/seed-0/weights.safetensors" in job.words
    assert not any(word.startswith("--trainer.max_epochs") for word in job.words)  # the original's setting, not its own


def test_values_that_no_folder_can_be_called_by():
    values = [{"class_path": "A"}, {"class_path": "B"}, "0/4", "x" * 50, "1/4"]
    folders = [job.folder.parts[2] for job in plan({"a": {"grid": {"m.layer": values}}})]
    assert len(set(folders)) == len(values)
    assert all("/" not in folder and len(folder) < 60 for folder in folders)


def test_equal_last_names_are_told_apart():
    (job,) = plan({"a": {"grid": {"model.lr": [1], "optimizer.lr": [2]}}})
    assert job.stage.point == "model.lr=1, optimizer.lr=2"


ERRORS = [
    ({"a": {"grid": [1]}}, ["'stages.a.grid' is [1]", "dotted keys"]),
    ({"a": {"grid": {"x": []}}}, ["'stages.a.grid.x' is []", "at least one value"]),
    ({"a": {"grid": {"x": 3}}}, ["'stages.a.grid.x' is 3"]),
    ({"a": {"grid": {"x": [1, 1]}}}, ["'stages.a.grid.x'", "1 twice"]),
    ({"a": {"grid": {"trainer.logger": [True]}}}, ["'trainer.logger'", "decides where"]),
    ({"a": {"grid": {"x": ["${seed}"]}}}, ["'stages.a.grid.x' has a reference"]),
    ({"a": {"search": 3}}, ["'stages.a.search' is 3"]),
    ({"a": {}, "b": {"config": ["${a.best}"]}}, ["${a.best}", "'a' is no search"]),
]


@pytest.mark.parametrize(("stages", "parts"), ERRORS, ids=[parts[-1] for _, parts in ERRORS])
def test_errors_are_one_sentence(stages, parts):
    with pytest.raises(UsageError) as caught:
        plan(stages)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_reference_is_one_row():
    with pytest.raises(UsageError, match=r"'stages.a' has or inherits a grid"):
        plan({"a": {"method": "A", "grid": {"x": [1, 2]}}}, reference="a")


def test_the_best_of_a_search_is_a_configuration():
    Path("base.yaml").write_text("model: {alpha: 1}\n")
    search = {"trials": 2, "metric": "val_loss", "space": {"model.alpha": [1, 2]}}
    jobs = plan({"tune": {"search": search}, "use": {"config": ["base.yaml", "${tune.best}"]}})
    assert jobs[0].stage.search == search
    assert jobs[1].words[:2] == ("--config=base.yaml", "--config=out/tune/all/seed-0/best.yaml")
    assert jobs[1].inputs == {"tune.best": Path("out/tune/all/seed-0/best.yaml")}
    before = jobs[1].key()
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "best.yaml").write_text("model: {alpha: 2}\n")
    assert jobs[1].key() != before
    changed = plan({"tune": {"search": search | {"trials": 3}}, "use": {"config": ["${tune.best}"]}})
    assert changed[0].key() != jobs[0].key()
