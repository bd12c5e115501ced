"""What a network learned from (protected) data, in numbers that a study's table can show."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers import accuracy, quiet_trainer, sgd, small_network
from tests.lightning_modules.runs import KillAfter
from torchlethe.callbacks import ProtectionEvaluation
from torchlethe.data import SymmetricNoise
from torchlethe.datamodules import DigitsDataModule
from torchlethe.lightning_modules import Classifier


def fit(folder, epochs=2, callback=None, data=None, **settings):
    callback = callback or ProtectionEvaluation()
    callbacks = [callback, *settings.pop("callbacks", [])]
    module = Classifier(small_network(), 10, sgd())
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **settings)
    data = data or DigitsDataModule()
    trainer.fit(module, datamodule=data, ckpt_path=settings.pop("ckpt_path", None))
    return module, data, trainer


def read(folder):
    with np.load(folder / "evaluation.npz") as arrays:
        return json.loads((folder / "evaluation.json").read_text()), dict(arrays)


def test_numbers_are_those_of_the_final_network(tmp_path):
    module, data, trainer = fit(tmp_path, data=DigitsDataModule(label_noise=SymmetricNoise(0.3)))
    found, arrays = read(tmp_path)
    test, train = (
        accuracy(module, data.eval_loader(part), data.prepare_batch) for part in (data.test_set, data.train_set)
    )
    assert found["acc_last"] == pytest.approx(test)
    assert found["train_accuracy"] == pytest.approx(train)
    confusion = arrays["confusion"]
    assert confusion.sum() == 597
    np.testing.assert_array_equal(confusion.sum(1), data.test_set.labels.bincount().numpy())
    assert 100 * confusion.trace() / 597 == pytest.approx(test)
    per_class = 100 * confusion.diagonal() / confusion.sum(1)
    np.testing.assert_allclose(found["meta"]["per_class_accuracy"], per_class)
    assert found["acc_worst_class"] == pytest.approx(per_class.min())
    curve = arrays["accuracy_curve"]
    assert len(curve) == 2
    assert curve[-1] == found["acc_last"]
    assert curve.max() == found["acc_max"]
    assert curve[found["meta"]["acc_max_epoch"] - 1] == found["acc_max"]
    assert (tmp_path / "accuracy.png").is_file()
    assert trainer.callback_metrics["acc_last"] == found["acc_last"]
    assert found["run_seconds"] > 0


def test_against_clean_training(tmp_path):
    fit(tmp_path / "clean")
    clean, _ = read(tmp_path / "clean")
    evaluation = ProtectionEvaluation(tmp_path / "clean", tmp_path / "clean" / "evaluation.json", every_n_epochs=2)
    fit(tmp_path / "noisy", 3, evaluation, DigitsDataModule(label_noise=SymmetricNoise(0.8)))
    found, arrays = read(tmp_path / "noisy")
    assert found["drop"] == pytest.approx(clean["acc_last"] - found["acc_last"])
    assert found["gain_over_clean_part"] == pytest.approx(-found["drop"])
    assert np.isnan(arrays["accuracy_curve"]).tolist() == [True, False, False]


def test_a_resumed_fit_keeps_its_curve(tmp_path):
    fit(tmp_path / "whole", 3)
    saved = ModelCheckpoint(tmp_path / "part", "last", enable_version_counter=False)
    fit(tmp_path / "part", 2, callbacks=[saved], enable_checkpointing=True)
    callback = ProtectionEvaluation()
    module = Classifier(small_network(), 10, sgd())
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path / "part")
    trainer.fit(module, datamodule=DigitsDataModule(), ckpt_path=tmp_path / "part" / "last.ckpt")
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    np.testing.assert_array_equal(part[1]["accuracy_curve"], whole[1]["accuracy_curve"])
    assert part[0]["acc_max"] == whole[0]["acc_max"]


def test_training_does_not_notice(tmp_path):
    module, _, _ = fit(tmp_path)
    plain = Classifier(small_network(), 10, sgd())
    quiet_trainer(max_epochs=2).fit(plain, datamodule=DigitsDataModule())
    for name, value in plain.network.state_dict().items():
        assert torch.equal(module.network.state_dict()[name], value), name


def test_a_test_has_no_curve(tmp_path):
    module = Classifier(small_network(), 10)
    trainer = quiet_trainer(callbacks=[ProtectionEvaluation()], default_root_dir=tmp_path)
    trainer.test(module, datamodule=DigitsDataModule(), verbose=False)
    found, arrays = read(tmp_path)
    assert "acc_max" not in found
    assert len(arrays["accuracy_curve"]) == 0
    assert arrays["confusion"].sum() == 597


def test_a_tried_out_run_writes_nothing(tmp_path):
    fit(tmp_path, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="stages='fit'"):
        ProtectionEvaluation(stages="fit")
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        ProtectionEvaluation(every_n_epochs=0)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        ProtectionEvaluation(filename="evaluation.txt")
    with pytest.raises(ValueError, match=r"reference is .* but there is no ProtectionEvaluation with an acc_last"):
        fit(tmp_path, callback=ProtectionEvaluation(tmp_path / "nowhere.json"), callbacks=[KillAfter(1)])
    (tmp_path / "evaluation.json").write_text('{"test_accuracy": 3}')
    with pytest.raises(ValueError, match="clean_part is"):
        fit(tmp_path, callback=ProtectionEvaluation(clean_part=tmp_path), callbacks=[KillAfter(1)])
