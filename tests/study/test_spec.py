"""What a study file may say, and what it hears otherwise."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from torchlethe._cli.catalog import configs_folder
from torchlethe._cli.errors import UsageError
from torchlethe.study import load_study, plan_jobs

GOOD = {
    "name": "A study",
    "seeds": [0, 1],
    "reference": "retrain",
    "original": "judged",
    "defaults": {"config": ["a.yaml"], "set": {"seed_everything": "${seed}", "trainer.max_epochs": 1}},
    "scenarios": {
        "one": {"title": "One class", "set": {"data.forget": {"class_path": "F", "init_args": {"classes": [3]}}}},
        "ten": {"stages": {"sfron": {"set": {"model.alpha": 5, "trainer.max_epochs": 3}}}},
    },
    "stages": {
        "sfron": {"method": "SFRon", "set": {"model.weights": "${original.weights}", "trainer.max_epochs": 2}},
        "original": {"per": ["seed"]},
        "judged": {"method": "Original", "command": "test", "set": {"x": ["${original.weights}", "${retrain.folder}"]}},
        "retrain": {"method": "Retrain", "set": {"trainer.callbacks+": {"class_path": "C"}}},
    },
}


def write(folder: Path, content) -> Path:
    (folder / "a.yaml").write_text("trainer: {max_epochs: 9}\n")
    path = folder / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def changed(*keys, to):
    """A copy of the good study with one value replaced."""
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return content


def test_stages_come_after_what_they_need(tmp_path):
    study = load_study(write(tmp_path, GOOD))
    assert list(study.stages) == ["original", "sfron", "retrain", "judged"]
    assert study.stages["judged"].needs == ("original", "retrain")
    assert list(study.methods) == ["SFRon", "Retrain", "Original"]


def test_plan_has_one_job_per_point_of_the_axes(tmp_path):
    jobs = plan_jobs(load_study(write(tmp_path, GOOD)), tmp_path / "out")
    assert len(jobs) == 2 + 3 * 2 * 2
    folders = {job.folder.relative_to(tmp_path / "out").as_posix() for job in jobs}
    assert {"original/seed-1", "sfron/ten/seed-0", "judged/one/seed-1"} <= folders
    before = set()
    for job in jobs:
        assert {need.folder for need in job.needs} <= before
        before.add(job.folder)


def test_later_layers_win_and_references_are_resolved(tmp_path):
    jobs = plan_jobs(load_study(write(tmp_path, GOOD)), "out")
    by_folder = {job.folder.as_posix(): job for job in jobs}
    words = by_folder["out/sfron/one/seed-1"].words
    assert words[0].startswith("--config=")
    assert words[0].endswith("a.yaml")
    assert "--seed_everything=1" in words
    assert "--model.weights=out/original/seed-1/weights.safetensors" in words
    assert '--data.forget={"class_path": "F", "init_args": {"classes": [3]}}' in words
    assert [word for word in words if "max_epochs" in word] == ["--trainer.max_epochs=2"]
    words = by_folder["out/sfron/ten/seed-0"].words
    assert [word for word in words if "max_epochs" in word] == ["--trainer.max_epochs=3"]
    assert "--model.alpha=5" in words
    assert '--trainer.callbacks+={"class_path": "C"}' in by_folder["out/retrain/one/seed-0"].words
    judged = by_folder["out/judged/one/seed-0"]
    assert '--x=["out/original/seed-0/weights.safetensors", "out/retrain/one/seed-0"]' in judged.words
    assert set(judged.inputs) == {"original.weights"}


def test_every_layer_may_append(tmp_path):
    content = changed("defaults", "set", to={"trainer.callbacks+": "A"})
    content["scenarios"]["one"]["set"] = {"trainer.callbacks+": "B"}
    job = next(job for job in plan_jobs(load_study(write(tmp_path, content))) if job.stage.name == "retrain")
    appended = [word for word in job.words if word.startswith("--trainer.callbacks+=")]
    assert appended == ["--trainer.callbacks+=A", "--trainer.callbacks+=B", '--trainer.callbacks+={"class_path": "C"}']


def test_a_study_without_scenarios_has_one(tmp_path):
    content = {"stages": {"a": {"method": "A"}}}
    (job,) = plan_jobs(load_study(write(tmp_path, content)), "out")
    assert job.folder == Path("out/a/all/seed-0")


ERRORS = [
    ("[1, 2]", ["the file is [1, 2]"]),
    ("stages: [\n", ["is not YAML", "line"]),
    ({"name": "x"}, ["'stages' is missing"]),
    (changed("sceds", to=1), ["unknown key 'sceds'", "did you mean 'seeds'"]),
    (changed("seeds", to=[]), ["'seeds' is []"]),
    (changed("seeds", to=[0, -1]), ["'seeds' is [0, -1]"]),
    (changed("seeds", to=[0, True]), ["'seeds'"]),
    (changed("seeds", to=[1, 1]), ["each seed counts once"]),
    (changed("reference", to="retain"), ["'reference' is 'retain'", "did you mean 'retrain'"]),
    (changed("reference", to="original"), ["'reference' is 'original'", "a stage with a 'method'"]),
    (changed("original", to="orig"), ["'original' is 'orig'"]),
    (changed("metrics", to=3), ["'metrics' is 3"]),
    (changed("defaults", "config", to=["b.yaml"]), ["'defaults.config'", "b.yaml"]),
    (changed("defaults", "set", to=[1]), ["'defaults.set'"]),
    (changed("defaults", "set", to={"trainer.logger": True}), ["'trainer.logger'", "decides where its runs write"]),
    (changed("defaults", "sett", to={}), ["unknown key 'sett' in 'defaults'", "did you mean 'set'"]),
    (changed("scenarios", "10 %", to={}), ["'10 %'", "is no name"]),
    (changed("scenarios", "ten", "stages", to={"sfrn": {}}), ["'sfrn'", "did you mean 'sfron'"]),
    (changed("stages", "sfron", "comand", to="fit"), ["unknown key 'comand'", "did you mean 'command'"]),
    (changed("stages", "sfron", "command", to="train"), ["'stages.sfron.command' is 'train'", "fit, validate"]),
    (changed("stages", "sfron", "needs", to=["orignal"]), ["needs 'orignal'", "did you mean 'original'"]),
    (changed("stages", "sfron", "method", to="Retrain"), ["two stages fill the row 'Retrain'"]),
    (changed("stages", "original", "method", to="O"), ["'per' must be [scenario, seed]"]),
    (changed("stages", "original", "per", to=["sed"]), ["names 'sed'", "scenario and seed"]),
    (changed("stages", "original", "needs", to=["sfron"]), ["original, sfron", "circle"]),
    (changed("stages", "original", "needs", to=["retrain"]), ["runs per seed", "also runs per scenario"]),
    (changed("stages", "sfron", "set", to={"a": "${orignal.weights}"}), ["needs 'orignal'"]),
    (changed("stages", "sfron", "set", to={"a": "${original.weight}"}), ["${original.weight}", "original.weights"]),
    (changed("stages", "sfron", "set", to={"a": "${sed}"}), ["${sed}", "did you mean 'seed'"]),
    (changed("stages", "original", "set", to={"a": "${scenario}"}), ["does not run per scenario"]),
    (changed("scenarios", "one", "set", to={"a": "${original.weights}"}), ["must list 'original' in its 'needs'"]),
]


@pytest.mark.parametrize(("content", "parts"), ERRORS, ids=[parts[0][:40] for _, parts in ERRORS])
def test_errors_are_one_sentence(content, parts, tmp_path):
    with pytest.raises(UsageError) as caught:
        load_study(write(tmp_path, content))
    message = str(caught.value)
    assert "study.yaml" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent.yaml"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match=r"is a folder; name the study file in it, such as .*study.yaml"):
        load_study(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read: it is no text"):
        load_study(tmp_path / "image.yaml")


def test_results_have_a_place_of_their_own_by_default(tmp_path, monkeypatch):
    folder = tmp_path / "thesis"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("study.yaml", "other.yaml"):
        Path(name).write_text("stages: {a: {}}\n")
    assert load_study("study.yaml").output == load_study(folder / "study.yaml").output == Path("runs/thesis")
    assert load_study("other.yaml").output == Path("runs/other")
    assert load_study("study.yaml").name == "thesis"


def test_the_documented_study_is_sound(tmp_path):
    page = (configs_folder().parent / "docs" / "studies.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.+?)```", page, re.DOTALL)
    shutil.copytree(configs_folder() / "digits", tmp_path / "digits")
    (tmp_path / "digits" / "documented.yaml").write_text(text)
    documented = load_study(tmp_path / "digits" / "documented.yaml")
    shipped = load_study(tmp_path / "digits" / "study.yaml")
    assert documented.seeds == shipped.seeds
    assert documented.output == shipped.output
    assert (documented.reference, documented.original) == (shipped.reference, shipped.original)
    assert set(documented.stages) == {"original", "retrain", "original_judged", "sfron"}
    assert all(set(job.inputs) for job in plan_jobs(documented) if job.stage.name in ("original_judged", "sfron"))
