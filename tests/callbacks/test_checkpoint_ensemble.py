"""CheckpointEnsemble keeps the right epochs of any module, resumes, replaces what is half done, keeps what is whole."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same_bits, quiet_trainer
from torchlethe.callbacks import CheckpointEnsemble
from torchlethe.components import CheckpointFolder, NetworkEnsemble
from torchlethe.io import file_hash, read_state_dict


class Somebodys(LightningModule):
    """A module that knows nothing of Lethe."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_epoch_end(self):
        self.seen[self.current_epoch] = {name: value.clone() for name, value in self.model.state_dict().items()}


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(16, 4, generator=generator), torch.arange(16) % 2), batch_size=8)


def run(folder, epochs, ckpt_path=None, callbacks=(), **settings):
    callback = CheckpointEnsemble(folder, **{"submodule": "model"} | settings)
    module = Somebodys()
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=[callback, *callbacks], enable_checkpointing=bool(callbacks), log_every_n_steps=1
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def epochs_of(folder):
    return [checkpoint.epoch for checkpoint in CheckpointFolder(folder).checkpoints]


def test_every_epoch_of_anyones_module_is_stored_as_it_was(tmp_path):
    module = run(tmp_path / "ensemble", 3)
    folder = CheckpointFolder(tmp_path / "ensemble")
    assert folder.about["complete"] is True
    assert [(c.epoch, c.step) for c in folder.checkpoints] == [(0, 2), (1, 4), (2, 6)]
    for checkpoint in folder.checkpoints:
        assert checkpoint.sha256 == file_hash(folder.path(checkpoint))
        assert checkpoint.metrics.keys() == {"train_loss"}
        assert_same_bits(folder.read(checkpoint), module.seen[checkpoint.epoch])
    files = {path.name for path in (tmp_path / "ensemble").iterdir()}
    assert files == {"ensemble.json", *(checkpoint.file for checkpoint in folder.checkpoints)}


def test_the_whole_module_and_another_dtype(tmp_path):
    run(tmp_path, 1, submodule=None, dtype="bfloat16")
    state = read_state_dict(tmp_path / "epoch-0000.safetensors")
    assert all(name.startswith("model.") for name in state)
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.int64}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_keep": 3}, [3, 7, 11]),
        ({"max_keep": 5}, [1, 3, 6, 8, 11]),
        ({"every_n_epochs": 2}, [1, 3, 5, 7, 9, 11]),
        ({"every_n_epochs": 2, "max_keep": 2}, [5, 11]),
        ({"max_keep": 40}, list(range(12))),
    ],
)
def test_a_run_of_known_length_keeps_equidistant_epochs_that_end_with_the_last(settings, expected, tmp_path):
    run(tmp_path, 12, **settings)
    assert epochs_of(tmp_path) == expected


def test_a_run_of_unknown_length_keeps_an_equidistant_reservoir(tmp_path):
    run(tmp_path, 11, max_keep=3, callbacks=[EarlyStopping("train_loss", patience=99)])
    assert epochs_of(tmp_path) == [3, 7]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_resumed_run_goes_on_with_its_list(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run(tmp_path / "whole", 6, callbacks=[saved])
    # as a run leaves it that was killed after epoch 5, and is resumed from the checkpoint of epoch 2
    run(tmp_path / "ensemble", 6)
    content = json.loads((tmp_path / "ensemble/ensemble.json").read_text())
    (tmp_path / "ensemble/ensemble.json").write_text(json.dumps(content | {"complete": False}))
    (tmp_path / "ensemble/epoch-0005.safetensors").write_bytes(b"half")
    run(tmp_path / "ensemble", 6, ckpt_path=tmp_path / "epoch=2.ckpt")
    first, second = CheckpointFolder(tmp_path / "whole"), CheckpointFolder(tmp_path / "ensemble")
    assert [c.sha256 for c in second.checkpoints] == [c.sha256 for c in first.checkpoints]
    for checkpoint in second.checkpoints:
        second.verify(checkpoint)


def test_a_finished_ensemble_is_not_replaced_but_a_half_done_one_is(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(ValueError, match="already holds the ensemble of a finished run"):
        run(tmp_path, 1)
    assert epochs_of(tmp_path) == [0, 1]
    content = json.loads((tmp_path / "ensemble.json").read_text())
    (tmp_path / "ensemble.json").write_text(json.dumps(content | {"complete": False}))
    run(tmp_path, 1)
    assert epochs_of(tmp_path) == [0]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="max_keep is 0"):
        CheckpointEnsemble(max_keep=0)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        CheckpointEnsemble(dtype="int8")
    with pytest.raises(ValueError, match="submodule is 'network', but Somebodys has no such part"):
        run(tmp_path, 1, submodule="network")
    with pytest.raises(FileNotFoundError, match=r"has no ensemble\.json"):
        CheckpointFolder(tmp_path)
    (tmp_path / "ensemble.json").write_text('{"checkpoints": [1]}')
    with pytest.raises(ValueError, match="is damaged"):
        CheckpointFolder(tmp_path)


def test_a_changed_file_is_noticed_and_too_many_are_refused(tmp_path):
    run(tmp_path, 2)
    folder = CheckpointFolder(tmp_path)
    (tmp_path / "epoch-0001.safetensors").write_bytes((tmp_path / "epoch-0000.safetensors").read_bytes())
    folder.verify(folder.checkpoints[0])
    with pytest.raises(ValueError, match="its sha256 differs"):
        folder.verify(folder.checkpoints[1])
    with pytest.raises(ValueError, match=r"checkpoints is 3, the ensemble .* holds 2"):
        folder.select(3)


def test_fast_dev_run_writes_nothing(tmp_path):
    callback = CheckpointEnsemble(tmp_path / "ensemble", submodule="model")
    quiet_trainer(fast_dev_run=True, callbacks=[callback]).fit(Somebodys(), loader())
    assert not (tmp_path / "ensemble").exists()


def test_the_ensemble_runs_as_networks_one_by_one_and_as_one_vectorised_model(tmp_path):
    module = run(tmp_path, 3)
    folder = CheckpointFolder(tmp_path)
    fills = [lambda part, c=c: folder.load(c, part) for c in folder.select(3)]
    ensemble = NetworkEnsemble(module.model, fills)
    x = torch.randn(5, 4)
    together = ensemble.all(x)
    for k in range(3):
        network = Somebodys().model.eval()
        network.load_state_dict(module.seen[k])
        torch.testing.assert_close(ensemble(k, x), network(x))
        torch.testing.assert_close(together[k], network(x))
