"""A prediction leaves a protected data set that is whole, checked, and not computed twice."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image

from tests.callbacks.protection_runs import Noise, protect
from tests.conftest import ROOT
from tests.helpers import quiet_trainer
from torchlethe.callbacks import ProtectedWriter
from torchlethe.callbacks.protection_pictures import draw_curves, draw_protection, magnified
from torchlethe.cli import main
from torchlethe.data import PositionedLoader, read_protected
from torchlethe.datamodules import DigitsDataModule, ProtectionDataModule
from torchlethe.lightning_modules.protection.base import ProtectionModule


def clean_digits():
    data = DigitsDataModule()
    data.setup()
    return data.train_set


def expected():
    data = clean_digits()
    return Noise().protect(data.images, data.labels, data.indices)


def test_the_whole_training_set_is_written(tmp_path):
    protect(tmp_path)
    folder = tmp_path / "protected"
    found = read_protected(folder)
    assert torch.equal(found.images, expected())
    assert torch.equal(found.labels, clean_digits().labels)
    assert len(list((folder / "images").rglob("*.png"))) == 1200
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["method"] == {"method": "Noise", "radius": 3, "amplitude": 3}
    assert manifest["bound"] == {"norm": "inf", "value": 3}
    assert manifest["verified"]["largest"] == 3
    assert manifest["images"] == manifest["verified"]["images"] == 1200
    assert Image.open(folder / "preview.png").size[0] > 500


def test_a_killed_run_goes_on_behind_what_is_finished(tmp_path):
    command = [sys.executable, "-m", "tests.callbacks.protection_runs", str(tmp_path), "2"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = tmp_path / "protected"
    assert not (folder / "manifest.json").exists()
    assert len(list((folder / "parts").glob("*.safetensors"))) == 2
    # with another batch size: whatever is finished stays finished
    protection = protect(tmp_path, batch_size=150)
    assert protection.seen == list(range(400, 1200))
    assert torch.equal(read_protected(folder).images, expected())
    again = protect(tmp_path)
    assert again.seen == []


def test_two_ranks_write_what_one_writes(tmp_path):
    """Each rank's share of the batches, padding included, into one folder."""
    protect(tmp_path / "one")
    data = ProtectionDataModule(DigitsDataModule(), indices=list(range(1199)), batch_size=100)
    data.setup()
    writer = ProtectedWriter(tmp_path / "two" / "protected", formats=["png", "npz"])
    module = ProtectionModule(Noise(), cache=False)
    trainer = quiet_trainer(callbacks=[writer])
    module.trainer, trainer.datamodule = trainer, data
    trainer.strategy.connect(module)
    writer.setup(trainer, module, "predict")
    seen = []
    for rank in (1, 0):
        loader = PositionedLoader(data.predict_set, batch_size=100, num_replicas=2, rank=rank)
        for number, batch in enumerate(loader):
            prediction = module.predict_step(batch, number)
            seen += prediction["index"].tolist()
            writer.write_on_batch_end(trainer, module, prediction, None, batch, number, 0)
    assert sorted(seen) == list(range(1199))
    writer.on_predict_end(trainer, module)
    found, alone = (read_protected(tmp_path / name / "protected") for name in ("two", "one"))
    assert torch.equal(found.images, alone.images[:1199])
    assert torch.equal(found.indices, torch.arange(1199))


def test_only_the_chosen_images(tmp_path):
    protect(tmp_path, data={"classes": [3, 5], "indices": list(range(300))})
    found, data = read_protected(tmp_path / "protected"), clean_digits()
    chosen = ((data.labels == 3) | (data.labels == 5)) & (data.indices < 300)
    assert torch.equal(found.indices, data.indices[chosen])
    assert torch.equal(found.images, expected()[chosen])


def test_other_settings_do_not_mix(tmp_path):
    protect(tmp_path)
    with pytest.raises(ValueError, match="another method, settings, precision, source or formats"):
        protect(tmp_path, Noise(amplitude=2))
    with pytest.raises(ValueError, match="another method, settings, precision, source or formats"):
        protect(tmp_path, data={"classes": [3]})
    with pytest.raises(ValueError, match="another method, settings, precision, source or formats"):
        protect(tmp_path, precision="64-true")


def pairs(shift=0):
    data = clean_digits()
    return torch.utils.data.TensorDataset(data.images[:100].roll(shift, 0), data.labels[:100].roll(shift, 0))


def predict_pairs(folder, dataset, **loader):
    writer = ProtectedWriter(folder, formats=["npz"])
    module = ProtectionModule(Noise(), cache=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=50, **loader)
    quiet_trainer(callbacks=[writer]).predict(module, loader, return_predictions=False)
    return module.protection.seen


def test_a_plain_loader_of_pairs_is_known_by_its_content(tmp_path):
    assert predict_pairs(tmp_path / "own", pairs()) == list(range(100))
    assert torch.equal(read_protected(tmp_path / "own").images, expected()[:100])
    assert predict_pairs(tmp_path / "own", pairs()) == []
    with pytest.raises(ValueError, match="another method, settings, precision, source or formats"):
        predict_pairs(tmp_path / "own", pairs(shift=1))


def test_a_plain_loader_that_shuffles_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shuffles, and its batches have no 'index'"):
        predict_pairs(tmp_path / "own", pairs(), shuffle=True)
    assert not (tmp_path / "own").exists()


def test_a_limited_or_tried_out_run(tmp_path):
    protect(tmp_path / "tried", fast_dev_run=True)
    assert not (tmp_path / "tried").exists()
    protect(tmp_path / "part", limit_predict_batches=1)
    assert len(read_protected(tmp_path / "part" / "protected").images) == 200


class Liar(Noise):
    def protect(self, image, label, index):
        return (image.int() + 9 * (index == 7)[:, None, None, None]).clamp(0, 255).byte()


def test_a_protection_that_exceeds_its_bound_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"index 7 was changed by 9 in the norm 'inf', but the method's bound is 3"):
        protect(tmp_path, Liar())
    assert not (tmp_path / "protected").exists()


class Other(LightningModule):
    def predict_step(self, batch, batch_idx):
        return {"index": batch["index"]}


def test_refusals(tmp_path):
    trainer = quiet_trainer(callbacks=[ProtectedWriter(tmp_path / "x")])
    with pytest.raises(ValueError, match="Other has no `protection`"):
        trainer.predict(Other(), datamodule=ProtectionDataModule(DigitsDataModule()))
    with pytest.raises(ValueError, match="formats contains 'gif'"):
        ProtectedWriter(formats=["gif"])
    with pytest.raises(ValueError, match="preview is -1"):
        ProtectedWriter(preview=-1)


def test_lethe_predict_writes_every_format_and_plain_libraries_read_it(tmp_path, capsys):
    words = ["--data", "ProtectionDataModule", "--data.data", "DigitsDataModule", "--model", "RandomNoise"]
    words += ["--model.radius", "5", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    words += ["--trainer.callbacks+=ProtectedWriter", "--trainer.callbacks.formats=[png,png_flat,npz,parquet]"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--return_predictions=false"]
    assert main(["predict", *words]) == 0, capsys.readouterr().err
    folder, clean = tmp_path / "protected", clean_digits().images.numpy().astype(int)
    arrays = dict(np.load(folder / "protected.npz"))
    assert np.abs(arrays["image"].astype(int) - clean).max() == 5
    for i in (0, 17, 1199):
        for path in (folder / "flat" / f"{i}.png", folder / "images" / str(arrays["label"][i]) / f"{i}.png"):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), arrays["image"][i, 0])
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert found["label"] == arrays["label"].tolist()
    np.testing.assert_array_equal(np.asarray(found[1199]["image"]), arrays["image"][1199, 0])
    assert not list(tmp_path.rglob("predictions*"))


def test_pictures_magnify_around_grey():
    clean = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    protected = clean.clone()
    protected[0, 0, 0, 0] += 2
    shown, factor = magnified(clean, protected)
    assert factor == pytest.approx(63.75)
    assert shown[0, 0, 0, 0] == 1
    assert torch.equal(shown[1], torch.full((3, 4, 4), 0.5))
    figure = draw_protection(clean, protected, ["cat", "dog"], "SEP")
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "SEP: no value changes by more than 2/255"
    assert len(figure.axes) == 6
    lines = draw_curves({"clean": [10, 90], "protected": [10, float("nan"), 30]}).axes[0].lines
    assert [line.get_label() for line in lines] == ["clean", "protected"]
    assert lines[1].get_xdata().tolist() == [1, 3]
