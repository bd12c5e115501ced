"""A prediction leaves a file with one row per sample."""

import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import digits, quiet_trainer, small_network
from torchlethe.callbacks import SavePredictions
from torchlethe.lightning_modules import Classifier


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def expected(module, data):
    data.prepare_data()
    data.setup("predict")
    found = {}
    for raw in data.predict_dataloader():
        batch = data.prepare_batch(raw)
        with torch.no_grad():
            found |= dict(zip(batch["index"].tolist(), module.eval()(batch["image"]).numpy(), strict=True))
    index = np.array(sorted(found))
    return index, np.stack([found[i] for i in index])


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_initialized(), reason="forks two ranks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rows_are_those_of_the_data_set_on_any_number_of_ranks(ranks, tmp_path):
    module = Classifier(small_network(), 10)
    settings = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {}
    trainer = quiet_trainer(
        logger=CSVLogger(tmp_path, name="logs", version=0),
        callbacks=[SavePredictions()],
        precision="bf16-mixed",
        **settings,
    )
    trainer.predict(module, datamodule=digits(), return_predictions=False)
    arrays = read(tmp_path / "logs" / "version_0" / "predictions.npz")
    index, logits = expected(module, digits())
    assert arrays["index"].dtype == np.int64
    assert arrays["logits"].dtype == np.float32
    np.testing.assert_array_equal(arrays["index"], index)
    np.testing.assert_allclose(arrays["logits"], logits, atol=0.05)
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["predictions.npz"]


class Plain(LightningModule):
    def __init__(self, answer=dict):
        super().__init__()
        self.layer, self.answer = nn.Linear(3, 2), answer

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.answer(logits=self.layer(batch[0]), index=torch.arange(len(batch[0])))


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_initialized(), reason="forks two ranks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_without_an_index_are_numbered_by_their_place_in_the_data(ranks, tmp_path):
    module, images = Plain(), torch.rand(11, 3)
    settings = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {}
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[SavePredictions()], **settings)
    trainer.predict(module, DataLoader(TensorDataset(images), 4), return_predictions=False)
    arrays = read(tmp_path / "predictions.npz")
    assert arrays["index"].tolist() == list(range(11))
    np.testing.assert_allclose(arrays["logits"], module.layer(images).detach(), atol=1e-6)


def test_padding_is_left_out_and_each_loader_has_its_file(tmp_path):
    images = torch.rand(6, 3)

    class Indexed(Plain):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return {"index": batch["index"], "logits": self.layer(batch["image"])}

    index = [5, -1, 3, 0, -1, 4]
    rows = [{"image": image, "index": i} for image, i in zip(images, index, strict=True)]
    module = Indexed()
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[SavePredictions()])
    trainer.predict(module, [DataLoader(rows, 4), DataLoader(rows[:3], 2)])
    arrays = read(tmp_path / "predictions_0.npz")
    assert arrays["index"].tolist() == [0, 3, 4, 5]
    np.testing.assert_allclose(arrays["logits"], module.layer(images[[3, 2, 5, 0]]).detach(), atol=1e-6)
    assert read(tmp_path / "predictions_1.npz")["index"].tolist() == [3, 5]


def test_a_fast_dev_run_writes_nothing(tmp_path):
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[SavePredictions()], fast_dev_run=True)
    trainer.predict(Plain(), DataLoader(TensorDataset(torch.rand(5, 3)), 4))
    assert not list(tmp_path.iterdir())


def test_wrong_use_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"filename is 'a\.csv', it must end in \.npz\.$"):
        SavePredictions("a.csv")
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[SavePredictions()])
    module = Plain(answer=lambda logits, index: logits)
    with pytest.raises(ValueError, match=r"needs Plain.predict_step to return a dict .*, got shape \(4, 2\)\.$"):
        trainer.predict(module, DataLoader(TensorDataset(torch.rand(5, 3)), 4))
