"""The command as a user meets it."""

import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import quiet_trainer
from torchlethe import __version__, callbacks
from torchlethe._cli.catalog import KINDS, entries, find_config, first_sentence
from torchlethe._cli.errors import explain
from torchlethe._cli.lightning import run
from torchlethe.cli import COMMANDS, main
from torchlethe.datamodules import DigitsDataModule
from torchlethe.lightning_modules import Classifier
from torchlethe.models import SmallCNN

FIT = shlex.split(
    "fit --model Classifier --model.network SmallCNN --model.num_classes 10 --data DigitsDataModule"
    " --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)
DRY = ["--trainer.fast_dev_run", "true"]


def words(text):
    return [*FIT, *DRY, *shlex.split(text)]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LETHE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A short run of Classifier with label smoothing."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--model.label_smoothing=0.1", "--trainer.max_steps=2", "--trainer.logger=false"]
    assert main([*FIT, *options, f"--trainer.default_root_dir={folder}"]) == 0
    return next((folder / "checkpoints").glob("*.ckpt"))


def test_version_help_and_list_need_no_torch():
    code = (
        "import sys; from torchlethe.cli import main;"
        "codes = [main([w]) for w in ('--version', '--help', 'list')];"
        "sys.exit(codes != [0, 0, 0] or 'torch' in sys.modules or 'lightning' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"lethe {__version__}\n")
    for command in COMMANDS:
        assert f"\n  {command} " in found.stdout
    for name in ("SFRon", "DigitsDataModule", "UnlearningEvaluation", "resnet18", "digits/study.yaml"):
        assert name in found.stdout


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "optimizers"])
def test_everything_listed_has_a_sentence(kind):
    found = entries(kind)
    assert found
    assert [entry.name for entry in found if not entry.summary] == []


def test_the_list_of_callbacks_holds_callbacks_only():
    exported = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert {entry.name for entry in entries("callbacks")} == exported


def test_networks_are_models(capsys):
    assert main(["list", "networks"]) == 0
    networks = capsys.readouterr().out
    assert main(["list", "models"]) == 0
    assert networks == capsys.readouterr().out


def test_shipped_configurations_are_found_by_their_listed_name(tmp_path):
    for name in ("digits/study.yaml", "configs/digits/study.yaml"):
        assert find_config(name).endswith("configs/digits/study.yaml")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "study.yaml").write_text("")
    assert find_config("digits/study.yaml") == "digits/study.yaml"
    assert find_config("absent.yaml") == "absent.yaml"


def test_first_sentence_reads_roles_as_text():
    assert first_sentence("A :class:`~a.b.Thing` of ``x``: more.\nSecond.") == "A Thing of x: more."


ERRORS = {
    "tset": ["unknown command 'tset'", "did you mean 'test'"],
    "train": ["unknown command 'train'", "allowed are fit"],
    "list modles": ["'modles'", "modules"],
    "fit": ["--model"],
    "fit --model Clasifier": ["'Clasifier'", "did you mean 'Classifier'"],
    "fit --model Classifier": ["Classifier needs network, num_classes"],
    "fit --model Classifier --model.netwrk MLP": ["--model.netwrk", "did you mean 'network'"],
    "fit --model.alpha 3 --model SFRon": ["'model.alpha' is given before its class"],
    "fit --config absent.yaml": ["--config: there is no file 'absent.yaml'", "lethe list configs"],
    "fit --model Classifier --model.network SmolCNN": ["did you mean 'SmallCNN'", "lethe list models"],
    "fit --model Classifier --model.network SmallCNN --model.num_classes 10": [
        "has no data",
        "--data DigitsDataModule",
    ],
    "fit --config key.yaml": ["unknown key 'modle'", "did you mean 'model'"],
    "fit --config trainer.yaml --model Classifier --model.network SmallCNN --model.num_classes 10": [
        "unknown key 'trainer.max_epoch'",
        "did you mean 'trainer.max_epochs'",
    ],
    "fit --config inner.yaml": ["--model.netwrk", "did you mean 'network'"],
    "fit --config broken.yaml": ["line 2"],
    "DRY --trainer.max_epoch 3": ["--trainer.max_epoch;", "did you mean 'trainer.max_epochs'"],
    "DRY --trainer.max_epochs three": ["--trainer.max_epochs", "three", "int"],
    "DRY --trainer.accelerator gpuu": ["gpuu", "cuda"],
    "DRY --trainer.accelerator cpu --trainer.devices 4096": ["--trainer.devices is 4096", "CPU cores"],
    "fit --config digits/sfron.yaml --model.optimizer.lr 0.02": [
        "'model.optimizer.lr' is given before its class",
        "--model.optimizer SGD --model.optimizer.lr 0.02",
    ],
    "DRY --model.lr_scheduler.T_max 3": ["--model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 3"],
    "fit --model Classifier --model.network.in_channels 3": ["--model.network CLASS --model.network.in_channels 3"],
    "DRY --data UnlearningDataModule --data.forget.classes [3]": ["--data.forget CLASS --data.forget.classes"],
    "fit --config digits/forget_class.yaml --config digits/sfron.yaml": [
        "SFRon changes a trained network",
        "--model.weights",
    ],
    "PROTECT AdversarialPoisoning --model.num_classes 10": [
        "AdversarialPoisoning protects with a trained network",
        "--model.weights",
    ],
    "PROTECT ErrorMinimizing --model.num_classes 10 --model.objective emax": [
        "ErrorMinimizing protects with a trained network"
    ],
    "fit --config digits/uap_data.yaml --config digits/fg_uap.yaml": [
        "FeatureGatheringUAP attacks a trained network",
        "--model.weights",
    ],
    "DRY --data.batch_sise 3": ["--data.batch_sise", "did you mean 'batch_size'"],
    "DRY --data.batch_size three": ["--data.batch_size", "three", "int"],
    "DRY --data.batch_size 0": ["batch_size is 0"],
    "DRY --data.image_size 16": ["--data.image_size", "8, 32", "16"],
    "DRY --model.network.num_classes 4": ["head has 4", "num_classes is 10"],
    "DRY --model.network.in_channels 3": ["in_channels=3"],
    "DRY --model.weights absent.pt": ["absent.pt"],
    "DRY --model.network absent.yaml": ["--model.network", "there is no file 'absent.yaml'"],
    "DRY --model.optimizer torch.optim.SGD --model.optimizer.momentm 1": ["SGD has no argument 'momentm'", "momentum"],
    "DRY --trainer.callbacks+=UnlearningEvalution": ["did you mean 'UnlearningEvaluation'"],
    "DRY --trainer.callbacks+=UnlearningEvaluation": ["has no data", "UnlearningDataModule"],
    "DRY --trainer.callbacks+=EarlyStopping": ["EarlyStopping needs monitor"],
    "DRY --ckpt_path absent.ckpt": ["absent.ckpt"],
    "DRY --ckpt_path damaged.ckpt": ["damaged.ckpt", "refused"],
    "DRY --ckpt_path plain.ckpt": ["plain.ckpt", "no Lightning checkpoint"],
    "DRY --data UnlearningDataModule": ["UnlearningDataModule needs data, forget"],
    "FORGET ForgetClasses --data.forget.classes [12]": ["classes contains 12"],
    "FORGET ForgetClasses --data.forget.classes []": ["classes is empty"],
    "FORGET ForgetIndices --data.forget.source absent.npy": ["absent.npy"],
    "FORGET ForgetFraction --data.forget.fraction 0": ["fraction is 0"],
    "DRY --model SFRon --model.alpha -3": ["alpha is -3"],
    "study absent.yaml": ["absent.yaml"],
    "study": ["FILE.yaml"],
    "study digits/study.yaml --force sfrn": ["'sfrn'", "did you mean 'sfron'"],
}


@pytest.mark.parametrize(("line", "parts"), ERRORS.items(), ids=ERRORS)
def test_an_error_is_one_sentence_with_the_key(line, parts, tmp_path, capfd):
    (tmp_path / "key.yaml").write_text("modle: {class_path: Classifier}\n")
    (tmp_path / "trainer.yaml").write_text("trainer: {max_epoch: 3}\n")
    (tmp_path / "inner.yaml").write_text("model: {class_path: Classifier, init_args: {netwrk: MLP}}\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "damaged.ckpt").write_bytes(b"hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.ckpt")
    line = line.replace("FORGET", "DRY --data UnlearningDataModule --data.data DigitsDataModule --data.forget")
    start = "predict --data ProtectionDataModule --data.data DigitsDataModule --model"
    line = line.replace("PROTECT", start) + " --model.network SmallCNN" * line.startswith("PROTECT")
    assert main(words(line[3:]) if line.startswith("DRY") else shlex.split(line)) == 2
    lines = [text for text in capfd.readouterr().err.splitlines() if text.startswith("lethe")]
    assert len(lines) == 1, lines
    assert ": error: " in lines[0]
    assert len(lines[0]) < 320
    for part in parts:
        assert part in lines[0]


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"weights 'absent.pt' do not exist"):
        main([*words("--model.weights absent.pt"), "--debug"])


def test_defects_keep_their_traceback(monkeypatch):
    def broken(words):
        raise KeyError("defect")

    monkeypatch.setattr("torchlethe._cli.catalog.show", broken)
    with pytest.raises(KeyError, match="defect"):
        main(["list"])


def test_errors_of_other_libraries_name_their_place():
    try:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    except RuntimeError as error:
        text = explain(error)
    assert "RuntimeError in test_cli.py:" in text
    assert "--debug" in text


def test_print_config_round_trips(tmp_path, capsys):
    options = [*FIT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.003", "--data.batch_size", "7"]
    options += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    assert main([*options, "--print_config"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003
    (tmp_path / "saved.yaml").write_text(first)
    assert main(["fit", "--config", "saved.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == first


def test_a_run_can_be_repeated_and_leaves_its_files(tmp_path, capsys):
    options = ["--trainer.max_steps=1", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    for _ in range(2):
        assert main([*FIT, *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "files  ."
    assert (tmp_path / "weights.safetensors").is_file()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["seed_everything"] == 0
    assert saved["model"]["class_path"] == "torchlethe.lightning_modules.Classifier"


class Unreadable(DigitsDataModule):
    def train_dataloader(self):
        raise ValueError("the disk is gone")


class NotSetUp(DigitsDataModule):
    def setup(self, stage=None):
        raise ValueError("the disk is gone")


def test_a_run_that_failed_at_its_loaders_spoils_no_later_run(capfd):
    line = " ".join([*FIT, *DRY]).replace("DigitsDataModule", f"{__name__}.Unreadable")
    assert main(shlex.split(line)) == 2
    assert "the disk is gone" in capfd.readouterr().err
    loader = DataLoader(TensorDataset(torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)), 2)  # by position
    quiet_trainer(fast_dev_run=True).fit(Classifier(SmallCNN(), 10), loader)


def test_a_run_with_a_logger_says_where_its_files_are(tmp_path, capsys):
    assert main([*FIT, "--trainer.max_steps=1", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "files  logs/lightning_logs/version_0"
    assert (tmp_path / "logs/lightning_logs/version_0/config.yaml").is_file()


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_refused_run_leaves_nothing_and_replaces_nothing(logger, tmp_path, capsys):
    options = ["--trainer.max_steps=1", f"--trainer.logger={logger}", "--trainer.logger.save_dir=logs"]
    refused = ["--model.num_classes=12"]
    assert main([*FIT, *options, *refused]) == 2
    assert not list(Path("logs").iterdir())
    assert main([*FIT, *options]) == 0
    files = {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()}
    assert main([*FIT, *options, *refused]) == 2
    assert {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()} == files
    assert [path.name for path in Path("logs/lightning_logs").iterdir()] == ["version_0"]
    unreadable = " ".join([*FIT, *options]).replace("DigitsDataModule", f"{__name__}.NotSetUp")
    assert main(shlex.split(unreadable)) == 2
    assert {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()} == files
    assert [path.name for path in Path("logs/lightning_logs").iterdir()] == ["version_0"]
    own = ["--trainer.max_steps=1", "--trainer.logger=false"]
    assert main([*FIT, *own]) == 0
    before = Path("config.yaml").read_bytes()
    assert main([*FIT, *own, *refused]) == 2
    assert Path("config.yaml").read_bytes() == before
    # one that gets as far as its loaders writes it, and leaves it there
    assert main(shlex.split(" ".join([*FIT, *own]).replace("DigitsDataModule", f"{__name__}.Unreadable"))) == 2
    assert "Unreadable" in Path("config.yaml").read_text()


def test_loggers_of_a_test_hear_of_data_and_seed(tmp_path):
    assert main(["test", *FIT[1:], "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]) == 0
    told = yaml.safe_load(Path("logs/lightning_logs/version_0/hparams.yaml").read_text())
    assert told["seed_everything"] == 0
    assert told["data"]["class_path"].endswith("DigitsDataModule")


def test_predictions_are_written(tmp_path):
    options = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main(["predict", *FIT[1:], *options]) == 0
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert arrays["logits"].shape == (len(arrays["index"]), 10)
    (tmp_path / "predictions.npz").unlink()
    assert (
        main(
            [
                "predict",
                *FIT[1:],
                *options,
                "--trainer.callbacks+=SavePredictions",
                "--trainer.callbacks.filename=mine.npz",
            ]
        )
        == 0
    )
    assert [path.name for path in tmp_path.glob("*.npz")] == ["mine.npz"]


def test_the_configuration_callback_can_be_sent_to_other_processes(tmp_path):
    cli = run("fit", [*FIT[1:], "--trainer.max_steps=1", "--trainer.logger=false"])
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SaveConfigCallback))
    received = pickle.loads(pickle.dumps(callback))
    assert received.config.as_dict().keys() == callback.config.as_dict().keys()


VIT = "torchlethe.models.VisionTransformer"
NETWORK = {"class_path": "SmallCNN", "init_args": {"num_classes": 10, "in_channels": 1, "image_size": 32}}


def test_what_another_class_takes_over_from_a_file_is_noted(tmp_path, capfd):
    layers = {
        "base.yaml": {"class_path": "Classifier", "init_args": {"num_classes": 10, "network": NETWORK}},
        "other.yaml": {"class_path": "Classifier", "init_args": {"network": {"class_path": VIT}}},
        "same.yaml": {"class_path": "Retrain"},
    }
    for name, model in layers.items():
        (tmp_path / name).write_text(yaml.safe_dump({"model": model}))

    def notes(*words):
        main(["fit", "--config", "base.yaml", *words, *DRY, "--model.weights", "absent.pt"])  # stops there
        return [line for line in capfd.readouterr().err.splitlines() if "kept" in line]

    for words in (["--model.network", VIT], ["--config", "other.yaml"]):
        (note,) = notes(*words)
        assert note.startswith("lethe fit: note: model.network: ")
        assert "in_channels=1" in note
        assert note.endswith(" kept from a file.")
    Path("network.yaml").write_text("class_path: SmallCNN\ninit_args: {num_classes: 10}\n")
    (note,) = notes("--model.network=network.yaml")
    assert note == "lethe fit: note: model.network: image_size=32 is kept from a file."
    assert notes("--model.network=network.yaml", "--model.network.image_size=32") == []
    assert notes("--model.network=network.yaml", '--model.network={"init_args": {"image_size": 32}}') == []
    assert notes("--model.network.image_size", "8") == []
    assert notes("--config", "same.yaml") == []
    assert notes("--model.network", VIT, "--model.network.in_channels", "1") == []  # typed


def test_a_network_with_weights_of_its_own_can_be_unlearned(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(
        "from torchlethe.models import MLP\nfrom torchlethe.models import normalized\n"
        "def pretrained_mlp(pretrained: bool = False) -> MLP:\n    return MLP()\n"
        "def wrapped(network: MLP) -> MLP:\n    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["fit", "--config", "digits/forget_class.yaml", "--model", "FineTune", "--model.num_classes", "10"]
    words += ["--model.network", "own_network.wrapped", "--model.network.network", "own_network.pretrained_mlp"]
    words += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert main(words) == 2
    assert main([*words, "--model.network.network.pretrained", "true"]) == 0


def test_a_typed_argument_is_never_dropped(capfd):
    line = "--model.optimizer SGD --model.optimizer.momentum 0.9 --model.optimizer Adam"
    assert main(words(line)) == 2
    assert "'momentum' would be dropped" in capfd.readouterr().err


def test_an_argument_of_the_same_name_deeper_down_is_kept(tmp_path):
    (tmp_path / "sgd.yaml").write_text(
        "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1}}}}"
    )
    line = shlex.split(
        "--config sgd.yaml --model.optimizer FriendlySAM --model.optimizer.base_optimizer torch.optim.AdamW"
        " --model.optimizer.base_optimizer.lr 0.25"
    )
    model = run("fit", [*FIT[1:], *line, *DRY]).model
    assert model.optimizers().optimizer.base.param_groups[0]["lr"] == 0.25


def test_an_argument_of_a_file_is_dropped_with_a_note(tmp_path, capfd):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "Classifier", "init_args": {"optimizer": optimizer}}})
    )
    options = [word for word in FIT[1:] if word not in ("--model", "Classifier")]
    assert main(["fit", "--config", "base.yaml", *options, *DRY, "--model.optimizer", "AdamW"]) == 0
    error = capfd.readouterr().err
    assert error.count("note: the class changes from SGD to AdamW, which has no argument 'momentum'") == 1
    assert "dampening" not in error  # a default that nobody set


def test_checkpoint_hyperparameters_are_plain_and_win_with_a_note(checkpoint, capfd):
    stored = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert stored["label_smoothing"] == 0.1
    assert stored["network"]["class_path"] == "torchlethe.models.SmallCNN"
    command = ["test", *FIT[1:], *DRY, f"--ckpt_path={checkpoint}"]
    assert main(command) == 0
    assert "note: model.label_smoothing is 0.1 from" in capfd.readouterr().err
    assert main([*command, "--model.label_smoothing=0.2"]) == 0
    error = capfd.readouterr().err
    assert "model.label_smoothing is 0.2 as typed" in error
    assert "was trained with 0.1" in error


def test_checkpoint_of_another_class_is_refused(checkpoint, capfd):
    command = [word if word != "Classifier" else "Retrain" for word in FIT[1:]]
    assert main(["test", *command, *DRY, f"--ckpt_path={checkpoint}"]) == 2
    assert "holds a Classifier, but the model is a Retrain" in capfd.readouterr().err


def test_unknown_stored_hyperparameters_are_named(checkpoint, tmp_path, capfd):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["retired"] = 3
    torch.save(content, tmp_path / "old.ckpt")
    assert main(["test", *FIT[1:], *DRY, "--model.label_smoothing=0.1", "--ckpt_path=old.ckpt"]) == 0
    assert "stores the hyper-parameter 'retired', which Classifier does not have" in capfd.readouterr().err


def test_checkpoint_that_executes_code_is_refused(tmp_path, capfd):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    assert main(words("--ckpt_path evil.ckpt")) == 2
    assert "could execute code" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_reader_that_leaves_early_is_no_error():
    for words in (["--help"], ["list"], ["evaluate", "--help"]):
        command = [sys.executable, "-m", "torchlethe.cli", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(timeout=60) in (0, 1, 141)  # argparse and rich look after themselves
