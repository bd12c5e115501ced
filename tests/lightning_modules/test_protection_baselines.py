"""Baseline protections under a Trainer: predicted, written and verified, and prepared but once."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import quiet_trainer
from torchlethe import lightning_modules as modules
from torchlethe.callbacks import ProtectedWriter
from torchlethe.data import read_protected
from torchlethe.datamodules import DigitsDataModule, ProtectionDataModule
from torchlethe.io import save_weights
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.models import Autoencoder, SmallCNN


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN(pooled=True)


def generator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(1, 8)


QUICK = {
    "RandomNoise": {"radius": 32},
    "AdversarialPoisoning": {"num_classes": 10, "radius": 32, "steps": 2, "restarts": 1, "crop": 0},
    "Hypocritical": {"radius": 32, "steps": 2},
    "TensorClog": {"radius": 32, "steps": 1, "crop": 0},
    "ErrorMinimizing": {"num_classes": 10, "radius": 32, "step": 8.0, "steps": 2, "rounds": 1, "stop_error": 1.0},
    "RobustErrorMinimizing": {
        "radius": 32,
        "step": 16.0,
        "steps": 1,
        "samples": 1,
        "attack_steps": 1,
        "train_steps": 2,
    },
    "DeepConfuse": {"radius": 32, "rounds": 1, "steps": 1},
    "SyntheticShortcut": {"num_classes": 10, "patch": 2},
    "Autoregressive": {"num_classes": 10, "min_response": 1.0},
    "OnePixelShortcut": {"num_classes": 10},
}
NETWORKLESS = {"RandomNoise", "SyntheticShortcut", "Autoregressive", "OnePixelShortcut"}
PREPARED = {"ErrorMinimizing", "RobustErrorMinimizing", "DeepConfuse", "SyntheticShortcut", "Autoregressive"}
PREPARED |= {"OnePixelShortcut"}


def module_of(name, **settings):
    arguments = QUICK[name] | settings
    if name not in NETWORKLESS:
        arguments["network"] = network()
    if name == "DeepConfuse":
        arguments["generator"] = generator()
    return getattr(modules, name)(**arguments)


def predict(module, folder, callbacks=(), batch_size=400, **trainer):
    data = ProtectionDataModule(DigitsDataModule(), batch_size=batch_size, indices=list(range(0, 1200, 10)))
    runner = quiet_trainer(default_root_dir=folder, callbacks=list(callbacks), **trainer)
    parts = runner.predict(module, datamodule=data)
    return {name: torch.cat([part[name] for part in parts]) for name in ("image", "label", "index")}


def clean():
    data = DigitsDataModule()
    data.setup()
    return data.train_set


def test_every_baseline_is_listed():
    kinds = {name for name in modules.__all__ if issubclass(getattr(modules, name), ProtectionModule)}
    assert kinds == {*QUICK, "ProtectionModule", "SelfEnsembleProtection"}


@pytest.mark.parametrize("name", QUICK)
def test_predicted_images_are_those_of_the_plain_protection(name, tmp_path):
    found = predict(module_of(name), tmp_path, [ProtectedWriter(formats=["npz"], preview=0)])
    plain, everything = module_of(name).protection, clean()
    plain.prepare([everything[range(1200)]], device="cpu")
    rows = everything[list(range(0, 1200, 10))]
    expected = plain.protect(rows["image"], rows["label"], rows["index"])
    assert torch.equal(found["index"], rows["index"])
    assert (found["image"] == expected).float().mean() > 0.99
    written = read_protected(tmp_path / "protected")
    assert torch.equal(written.images, found["image"])
    manifest = json.loads((tmp_path / "protected" / "manifest.json").read_text())
    assert manifest["method"] == json.loads(json.dumps(plain.describe()))
    assert manifest["bound"] == plain.bound()
    assert 0 < manifest["verified"]["largest"] <= manifest["verified"]["allowed"]


@pytest.mark.parametrize("name", sorted(PREPARED))
def test_what_was_prepared_is_read_by_the_next_run(name, tmp_path, monkeypatch):
    first = predict(module_of(name), tmp_path)
    again = module_of(name)
    monkeypatch.setattr(again.protection, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    second = predict(again, tmp_path, batch_size=77)
    assert (first["image"] == second["image"]).float().mean() > 0.99


@pytest.mark.parametrize("name", ["ErrorMinimizing", "RobustErrorMinimizing", "DeepConfuse", "SyntheticShortcut"])
def test_preparations_run_in_float32_whatever_the_precision(name, tmp_path):
    expected = predict(module_of(name, seed=3), tmp_path / "32")["image"]
    for precision in ("64-true", "bf16-mixed"):
        found = predict(module_of(name, seed=3), tmp_path / precision, precision=precision)["image"]
        assert torch.equal(found, expected), precision


class _Counter(Callback):
    """Nothing but the count of protected images."""

    count = 0

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.count += len(outputs["index"])


def test_reports_and_bf16(tmp_path):
    counter = _Counter()
    module = module_of("Hypocritical")
    predict(module, tmp_path, [counter], precision="bf16-mixed")
    assert counter.count == module.report["images"] == 120
    assert 0 < module.report["changed_max"] <= 32
    assert "crafting_loss" in module.report


def test_weights_are_loaded_before_crafting(tmp_path):
    other = SmallCNN(pooled=True)
    path = save_weights(other, tmp_path / "other.safetensors")
    for name in ("AdversarialPoisoning", "Hypocritical", "TensorClog"):
        module = module_of(name, weights=path)
        assert torch.equal(module.networks["network"].linear.weight, other.linear.weight)
        with pytest.raises(FileNotFoundError):
            module_of(name, weights=tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("ErrorMinimizing", {"rounds": 4, "stop_error": 0.0001, "train_steps": 3}, 4),
        ("ErrorMinimizing", {"rounds": 4, "stop_error": 0.0001, "noise_of": "class"}, 4),
        ("RobustErrorMinimizing", {"train_steps": 5, "decay_every": 2}, 5),
        ("DeepConfuse", {"rounds": 2, "steps": 3}, 6),
    ],
)
@pytest.mark.parametrize("killed_after", [2, 3])
@pytest.mark.filterwarnings("ignore:after rounds=4")
def test_a_killed_preparation_goes_on_where_it_was(name, settings, steps, killed_after, tmp_path, monkeypatch):
    from torchlethe.lightning_modules.protection import base

    straight = predict(module_of(name, **settings), tmp_path / "straight", batch_size=60)
    written = []

    def write(path, state):
        written.append(path.name)
        keep(path, state)
        if len(written) == killed_after:
            raise KeyboardInterrupt

    keep = base._write
    monkeypatch.setattr(base, "_write", write)
    monkeypatch.setattr(base, "Snapshots", partial(base.Snapshots, every=0))
    with pytest.raises(BaseException):  # noqa: B017  Lightning turns an interrupt into an exit
        predict(module_of(name, **settings), tmp_path / "killed", batch_size=60)
    assert len(list((tmp_path / "killed" / "prepared").iterdir())) == 1
    resumed = predict(module_of(name, **settings), tmp_path / "killed", batch_size=60)
    assert torch.equal(resumed["image"], straight["image"])
    assert len(written) == steps + 1  # each step once, and the outcome
    (left,) = (tmp_path / "killed" / "prepared").iterdir()
    assert left.name == written[-1]


@pytest.mark.parametrize("name", ["ErrorMinimizing", "RobustErrorMinimizing", "AdversarialPoisoning", "TensorClog"])
def test_a_step_in_fractions_of_the_range_is_refused(name):
    with pytest.raises(ValueError, match=r"step is 0\.0031.*, it must be .* 0\.8 rather than 0\.8/255"):
        module_of(name, step=0.8 / 255)


def test_a_set_that_did_not_change_says_so(tmp_path):
    still = module_of("RandomNoise")
    still.protection.protect = lambda image, label, index: image.clone()
    with pytest.warns(UserWarning, match="RandomNoise changed no pixel"):
        predict(still, tmp_path)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (torch.eye(10).repeat(2, 1), r"label is torch\.float32 \(20, 10\)"),
        (torch.eye(10, dtype=torch.int64).repeat(2, 1), r"label is torch\.int64 \(20, 10\)"),
        (torch.tensor([0] * 19 + [10]), "the data has the label 10, but num_classes is 10"),
    ],
)
def test_labels_are_looked_at_before_anything_is_written(label, sentence, tmp_path):
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, label), batch_size=20 if label.ndim > 1 else 5)
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[ProtectedWriter()])
    with pytest.raises(ValueError, match=sentence):
        trainer.predict(module_of("AdversarialPoisoning"), loader)
    assert not list(tmp_path.iterdir())
