"""SEP under Lightning: predict protects, in any mode and division, keeps class means, and says what is wrong."""

import json

import pytest
import torch
from torch import nn

from tests.helpers import digits, quiet_trainer
from torchlethe.callbacks import CheckpointEnsemble
from torchlethe.lightning_modules import CheckpointDiversity, Classifier, SelfEnsembleProtection
from torchlethe.lightning_modules.protection.base import pixels
from torchlethe.models import SmallCNN

VARIANTS = ["sep", "sep_fa", "sep_fa_vr"]


@pytest.fixture(scope="module")
def data():
    module = digits(label_noise=None, test_size=1677, eval_batch_size=50)
    module.setup()
    return module


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "ensemble"
    torch.manual_seed(0)
    module = Classifier(SmallCNN(pooled=True), 10, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    quiet_trainer(max_epochs=6, callbacks=[CheckpointEnsemble(folder)]).fit(module, datamodule=data)
    return folder


def made(ensemble, **settings):
    defaults = {"radius": 16, "step": 4, "steps": 4, "checkpoints": 3, "inner_steps": 3, "cache": False}
    return SelfEnsembleProtection(SmallCNN(pooled=True), 10, ensemble, **defaults | settings)


def predict(module, data, batch_size=50, precision="64-true", **kwargs):
    loader = torch.utils.data.DataLoader(data.train_set, batch_size, collate_fn=lambda rows: join(rows))
    parts = quiet_trainer(precision=precision, **kwargs).predict(module, loader)
    return {name: torch.cat([part[name] for part in parts]) for name in ("index", "image", "label")}


def join(rows):
    # collate of a stock loader over whole batches
    return rows if isinstance(rows, dict) else torch.utils.data.default_collate(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_predict_protects_within_the_bound_with_and_without_inference_mode(variant, data, ensemble):
    module = made(ensemble, variant=variant)
    found = predict(module, data)
    assert found["image"].dtype is torch.uint8
    assert torch.equal(found["label"], data.train_set.labels)
    assert torch.equal(found["index"], data.train_set.indices)
    clean = data.train_set.read(data.train_set.rows)
    assert (found["image"].int() - clean.int()).abs().max() == 16
    report = module.report
    assert report["images"] == 120
    assert report["changed_max"] == 16
    assert report["loss"] < report["loss_before"]
    assert 0 <= report["unrecognised"] <= 1
    assert report["psnr"] > 20
    again = predict(made(ensemble, variant=variant), data, inference_mode=False)
    assert torch.equal(again["image"], found["image"])
    odd = predict(made(ensemble, variant=variant), data, batch_size=7)
    assert torch.equal(odd["image"], found["image"])


def test_floating_images_on_the_grid_are_the_same_bytes(data, ensemble):
    found = predict(made(ensemble), data, precision="32-true")
    module = made(ensemble)
    parts = quiet_trainer().predict(module, data.eval_loader(data.train_set))
    assert torch.equal(torch.cat([part["image"] for part in parts]), found["image"])
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(pixels(images.float() / 255), images)
    for bad in (images.float() / 255 - 0.001, images.half() / 255, images.float() / 255 * 2):
        with pytest.raises(ValueError, match="off the grid of 1/255"):
            pixels(bad)


def test_bfloat16_keeps_the_bound_and_stays_close(data, ensemble):
    exact = predict(made(ensemble), data, precision="32-true")
    found = predict(made(ensemble), data, precision="bf16-mixed")
    clean = data.train_set.read(data.train_set.rows)
    assert (found["image"].int() - clean.int()).abs().max() <= 16
    assert (found["image"] == exact["image"]).double().mean() > 0.7


def test_class_means_are_kept_by_content(data, ensemble, tmp_path, monkeypatch):
    first = predict(made(ensemble, variant="sep_fa", cache=True, cache_dir=tmp_path), data)
    (kept,) = tmp_path.iterdir()
    assert torch.load(kept, weights_only=True)["means"].shape == (3, 10, 32)
    # another radius uses the same means; other checkpoints do not
    other = made(ensemble, variant="sep_fa", radius=8, cache=True, cache_dir=tmp_path)
    monkeypatch.setattr(other.protection, "_prepare", lambda *_: pytest.fail("measured again"))
    predict(other, data)
    second = made(ensemble, variant="sep_fa", cache=True, cache_dir=tmp_path)
    assert torch.equal(predict(second, data)["image"], first["image"])
    predict(made(ensemble, variant="sep_fa", checkpoints=2, cache=True, cache_dir=tmp_path), data)
    assert len(list(tmp_path.iterdir())) == 2


def test_finished_images_are_left_out(data, ensemble):
    module = made(ensemble)
    everything = predict(made(ensemble), data)
    module.skip(data.train_set.indices[:70])
    rest = predict(module, data)
    assert torch.equal(rest["index"], everything["index"][70:])
    assert torch.equal(rest["image"], everything["image"][70:])
    assert module.report["images"] == 50


def test_diversity_of_checkpoints(data, ensemble, tmp_path):
    module = CheckpointDiversity(SmallCNN(pooled=True), 10, ensemble, checkpoints=3)
    scores = quiet_trainer(default_root_dir=tmp_path).test(module, data.eval_loader(data.train_set), verbose=False)[0]
    written = json.loads((tmp_path / "cosines.json").read_text())
    assert written["epochs"] == [1, 3, 5]
    assert written["images"] == 120
    cosines = torch.tensor(written["cosines"])
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3), rtol=0, atol=1e-3)
    assert scores["mean_cosine"] == pytest.approx(float(cosines[~torch.eye(3, dtype=torch.bool)].mean()), abs=1e-6)
    assert (tmp_path / "cosines.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(data, ensemble, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints is 30, the ensemble .* holds 6"):
        made(ensemble, checkpoints=30)
    with pytest.raises(FileNotFoundError, match=r"has no ensemble\.json"):
        made(tmp_path)
    with pytest.raises(ValueError, match="do not fit SmallCNN"):
        SelfEnsembleProtection(SmallCNN(), 10, ensemble, checkpoints=2)
    with pytest.raises(ValueError, match="precision is bf16-true"):
        predict(made(ensemble), data, precision="bf16-true")
    with pytest.raises(ValueError, match="runs with `predict`, not with `test`"):
        made(ensemble).setup("test")


class Foreign(nn.Module):
    """A classifier of somebody else's, with a head under a usual name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(144, 10)

    def forward(self, image):
        return self.fc(self.body(image))


def test_any_network_and_plain_pairs_of_images_and_labels(data, tmp_path):
    torch.manual_seed(0)
    module = Classifier(Foreign(), 10)
    quiet_trainer(max_epochs=2, callbacks=[CheckpointEnsemble(tmp_path)]).fit(module, datamodule=data)
    rows = torch.utils.data.TensorDataset(data.train_set.read(data.train_set.rows), data.train_set.labels)
    for variant in VARIANTS:
        rule = SelfEnsembleProtection(
            Foreign(), 10, tmp_path, variant, radius=8, steps=3, checkpoints=2, inner_steps=2, cache=False
        )
        parts = quiet_trainer().predict(rule, torch.utils.data.DataLoader(rows, 50))
        assert torch.cat([part["index"] for part in parts]).tolist() == list(range(120))
        assert 0 < rule.report["changed_max"] <= 3
