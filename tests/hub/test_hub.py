"""Weights and reports that leave and come back: what arrives, what it says, what is refused."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file

from tests.helpers import assert_same_bits
from torchlethe import hub
from torchlethe.cli import main
from torchlethe.hub.card import loading_code
from torchlethe.hub.safety import command_without_paths, without_paths
from torchlethe.io import file_hash, load_weights, save_weights
from torchlethe.models import SmallCNN

FIT = shlex.split(
    "fit --config digits/forget_class.yaml --config digits/original.yaml --config digits/retrain.yaml"
    " --trainer.max_epochs=1 --trainer.logger=false --trainer.enable_progress_bar=false"
    " --trainer.enable_model_summary=false --trainer.callbacks+=UnlearningEvaluation"
)


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of Retrain on digits, as a study leaves it."""
    folder = tmp_path_factory.mktemp("private") / "run"
    command = [*FIT, f"--trainer.default_root_dir={folder}"]
    assert main(command) == 0
    (folder / "stage.json").write_text(json.dumps({"command": shlex.join(["lethe", *command])}))
    return folder


@pytest.fixture
def study(tmp_path):
    """A study's folder, with a report."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "report.html").write_text("<h1>Forgetting digits</h1>")
    (folder / "table.md").write_text("| method | forget accuracy |\n| --- | --- |\n| SFRon | 3.1 ± 0.2 |\n")
    (folder / "table.csv").write_text("method,forget accuracy\nSFRon,3.1\n")
    return folder


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_out_and_comes_back(run, study, tmp_path, capsys):
    assert main(["push", str(run), "./out/retrain", "--report", "study", "--license", "apache-2.0"]) == 0
    assert capsys.readouterr().out == "pushed  out/retrain\n"
    assert main(["pull", "./out/retrain", "back"]) == 0
    back = tmp_path / "back"
    expected = ["README.md", "config.yaml", "evaluation.json", "model.safetensors"]
    assert names(back) == sorted([*expected, "report.html", "table.csv", "table.md"])
    for path in back.iterdir():
        assert path.read_bytes() == (tmp_path / "out/retrain" / path.name).read_bytes()
    assert_same_bits(load_file(back / "model.safetensors"), load_file(run / "weights.safetensors"))
    assert names(tmp_path) == ["back", "out", "study"]
    assert names(tmp_path / "out") == ["retrain"]


def test_the_card_says_what_the_run_was(run, tmp_path):
    hub.push(run, "./out", license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "torchlethe")
    assert "machine-unlearning" in card.data.tags
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["test_accuracy"].metric_value == pytest.approx(evaluation["test_accuracy"], abs=1e-5)
    assert found["test_accuracy"].dataset_name == "Digits"
    assert found["test_accuracy"].dataset_args["split_hash"] == evaluation["meta"]["split_hash"]
    assert found["test_accuracy"].dataset_args["forget"]["init_args"] == {"classes": [3]}
    assert "original_test_accuracy" not in found
    for text in ("`Retrain`", "lethe fit --config config.yaml", "classes:\n  - 3", evaluation["meta"]["split_hash"]):
        assert text in card.text
    assert f"| test accuracy (%) | {evaluation['test_accuracy']:.4g} |" in card.text


def test_the_code_on_the_card_loads_the_weights(run, tmp_path):
    hub.push(run, "./out")
    with_lethe, without = (
        part.split("```")[0] for part in (tmp_path / "out/README.md").read_text().split("```python")[1:]
    )
    code = f"{with_lethe}\n{without}\nimport torch\nnetwork.load_state_dict(state)\n"
    code += "torch.save(network(torch.ones(2, 1, 8, 8)), 'logits.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, timeout=60)
    network = load_weights(SmallCNN(num_classes=10, in_channels=1, image_size=8), run / "weights.safetensors").eval()
    assert torch.equal(torch.load(tmp_path / "out/logits.pt", weights_only=True), network(torch.ones(2, 1, 8, 8)))


def test_nested_networks_become_python():
    inner = {"class_path": "torchlethe.models.torchvision_network", "init_args": {"name": "swin_t", "pretrained": True}}
    outer = {"class_path": "torchlethe.models.normalized", "init_args": {"network": inner, "statistics": "imagenet"}}
    code = loading_code(outer)
    assert (
        "network = normalized(network=torchvision_network(name='swin_t', pretrained=False), statistics='imagenet')"
        in code
    )
    assert "from torchlethe.models import normalized\nfrom torchlethe.models import torchvision_network" in code


def test_no_private_path_leaves(run, tmp_path):
    hub.push(run, "./out")
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".safetensors":
            assert str(run.parent) not in path.read_text(), path.name
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["trainer"]["default_root_dir"] == "run"


def test_paths_are_shortened_wherever_they_stand(tmp_path):
    inside = {"files": [str(tmp_path / "runs/a.pt"), "relative/b.pt"], "url": "https://host/c", "ratio": "1/2 of it"}
    expected = {"files": ["runs/a.pt", "relative/b.pt"], "url": "https://host/c", "ratio": "1/2 of it"}
    assert without_paths(inside) == expected
    assert without_paths({"w": "C:\\Users\\ada\\w.pt", "f": "file:///home/ada/f.ckpt", "h": "~/h.pt"}) == {
        "w": "w.pt",
        "f": "f.ckpt",
        "h": "h.pt",
    }
    value = json.dumps({"init_args": {"reference": "/home/ada/my runs/r.pt"}})
    command = shlex.join(["lethe", "fit", f"--trainer.callbacks+={value}", "--data.root=/data/cifar"])
    assert shlex.split(command_without_paths(command))[2:] == [
        '--trainer.callbacks+={"init_args": {"reference": "r.pt"}}',
        "--data.root=cifar",
    ]


def test_a_checkpoint_is_converted_to_what_the_export_holds(run, tmp_path):
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    hub.push(checkpoint, "./out")
    assert names(tmp_path / "out") == ["README.md", "model.safetensors"]  # a file alone says nothing about its run
    assert_same_bits(load_file(tmp_path / "out/model.safetensors"), load_file(run / "weights.safetensors"))
    assert "without the folder of their run" in (tmp_path / "out/README.md").read_text()


def test_a_report_goes_alone(study, tmp_path):
    hub.push("study", "folder:out")
    assert names(tmp_path / "out") == ["README.md", "report.html", "table.csv", "table.md"]
    card = (tmp_path / "out/README.md").read_text()
    assert "| SFRon | 3.1 ± 0.2 |" in card
    assert "load_weights" not in card


def test_an_evaluation_made_elsewhere_goes_along(run, tmp_path):
    save_weights(SmallCNN(), tmp_path / "own.safetensors")
    hub.push("own.safetensors", "./out", evaluation=run / "evaluation.json")
    assert ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert "| forget accuracy (%) |" in (tmp_path / "out/README.md").read_text()


def test_an_evaluation_of_other_weights_is_refused(run, tmp_path):
    """What ``lethe evaluate`` writes names the weights that it judged."""
    save_weights(SmallCNN(), tmp_path / "own.safetensors")
    metrics = {"test_accuracy": 90.0, "meta": {"weights": {"sha256": file_hash(run / "weights.safetensors")}}}
    (tmp_path / "judged.json").write_text(json.dumps(metrics))
    hub.push(run, "./out", evaluation="judged.json")
    assert "| test accuracy (%) | 90 |" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match=r"'judged\.json' is the evaluation of other weights"):
        hub.push("own.safetensors", "./other", evaluation="judged.json")
    assert not (tmp_path / "other").exists()


def test_a_second_push_replaces_the_first_as_a_whole(run, study, tmp_path):
    hub.push(run, "./out", report="study")
    hub.push(run, "./out")
    assert names(tmp_path / "out") == ["README.md", "config.yaml", "evaluation.json", "model.safetensors"]
    assert names(tmp_path) == ["out", "study"]


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', so it is left alone"):
        hub.push(run, "./thesis")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', so it is left alone"):
        hub.pull(run, "thesis")
    assert names(tmp_path / "thesis") == ["thesis.tex"]


def test_after_a_failure_the_old_folder_stands(run, tmp_path, monkeypatch):
    hub.push(run, "./out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(facts):
        raise OSError("the disk is full")

    monkeypatch.setattr("torchlethe.hub.transfer.card", full)
    for destination in ("./out", "./new"):
        with pytest.raises(OSError, match="full"):
            hub.push(run, destination)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == ["out"]


def test_weights_that_execute_code_are_not_pushed(tmp_path):
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could execute code"):
        hub.push("evil.pt", "./out")
    assert names(tmp_path) == ["evil.pt"]


@pytest.mark.parametrize("kind", ["pickle", "script", "disguised", "link"])
def test_unsafe_folders_are_not_pulled(kind, run, tmp_path, capfd):
    hub.push(run, "./out")
    if kind == "link":
        (tmp_path / "out/notes.txt").symlink_to("/etc/hostname")
    elif kind == "script":
        (tmp_path / "out/modeling.py").write_text("print('executed')")
    else:
        torch.save(Evil(), tmp_path / "out" / ("extra.bin" if kind == "pickle" else "model.safetensors"))
    assert main(["pull", "./out", "back"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("lethe pull: error: './out' was refused: '")
    assert error.count("\n") == 1
    assert names(tmp_path) == ["out"]


ERRORS = {
    "push absent ./out": ["'absent'"],
    "push RUN": ["DESTINATION"],
    "push RUN ./out --privat": ["--privat"],
    "push RUN ./out --private": ["--private is for the Hub", "./out"],
    "push RUN ./out --report absent": ["there is no report 'absent'"],
    "push RUN ./out --evaluation absent.json": ["absent.json"],
    "push RUN ./out --evaluation damaged.json": ["damaged.json", "damaged"],
    "push two ./out": ["a.pt, b.safetensors", "give one"],
    "push RUN/.. ./out": ["no weights.safetensors"],
    "push RUN/checkpoints/absent.ckpt ./out": ["absent.ckpt"],
    "push RUN a/b/c": ["a/b/c", "name/repository", "./a/b/c"],
    "push RUN ada/digits": ["ada/digits", "cannot be reached", "./ada/digits"],
    "pull ada/digits ./out": ["ada/digits", "cannot be reached"],
    "pull ./absent ./out": ["'absent'"],
    "pull two ./out --revision main": ["--revision main is for the Hub"],
    "pull two two/inside": ["'two/inside'", "inside of it"],
    "pull two damaged.json": ["'damaged.json' is a file"],
}


@pytest.mark.parametrize(("line", "parts"), ERRORS.items(), ids=ERRORS)
def test_an_error_is_one_sentence(line, parts, run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    (tmp_path / "damaged.json").write_text("[1,")
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / "two" / name).write_bytes(b"")
    assert main(shlex.split(line.replace("RUN", str(run)))) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"lethe {line.split()[0]}: error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert names(tmp_path) == ["damaged.json", "two"]


@pytest.fixture
def remote(monkeypatch):
    """The Hub's client with its real signatures, in place of a server; it records what it is told."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl("https://huggingface.co/ada/digits")
    api.list_repo_files.return_value = ["README.md", "report.html", "LICENSE", "picture.png"]
    api.repo_info.return_value = SimpleNamespace(private=False, sha="c0ffee")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: api)
    return api


def test_the_hub_gets_one_commit_that_spares_foreign_files(run, remote):
    assert hub.push(run, "ada/digits") == "https://huggingface.co/ada/digits"
    (call,) = remote.create_commit.call_args_list
    operations = call.args[1]
    added = {o.path_in_repo for o in operations if isinstance(o, CommitOperationAdd)}
    assert added == {"README.md", "config.yaml", "evaluation.json", "model.safetensors"}
    assert [o.path_in_repo for o in operations if isinstance(o, CommitOperationDelete)] == ["report.html"]


def test_private_weights_do_not_go_to_a_public_repository(run, remote):
    with pytest.raises(ValueError, match="public already; nothing was pushed"):
        hub.push(run, "ada/digits", private=True)
    remote.create_commit.assert_not_called()


def test_an_unsafe_repository_is_refused_before_the_download(remote, tmp_path):
    remote.list_repo_files.return_value = ["README.md", "pytorch_model.bin"]
    with pytest.raises(ValueError, match=r"'pytorch_model\.bin' could execute code"):
        hub.pull("ada/digits", "back")
    remote.snapshot_download.assert_not_called()
    assert names(tmp_path) == []


def test_a_repository_is_fetched_at_the_commit_that_was_checked(remote, tmp_path):
    def fetch(repository, revision, local_dir):
        (local_dir / "README.md").write_text(f"{repository} {revision}")
        (local_dir / ".cache/huggingface").mkdir(parents=True)

    remote.snapshot_download.side_effect = fetch
    assert hub.pull("ada/digits", "back") == hub.pull("ada/digits", "back")  # the second replaces the first
    assert names(tmp_path / "back") == ["README.md"]
    assert (tmp_path / "back/README.md").read_text() == "ada/digits c0ffee"
