"""Settings are chosen by what held-out training images say; the test images have no part in it."""

import json

import pytest
import torch

from tests.helpers import quiet_trainer, sgd, small_network
from torchlethe.callbacks import UnlearningEvaluation
from torchlethe.data import ForgetFraction
from torchlethe.datamodules import DigitsDataModule, UnlearningDataModule
from torchlethe.io import save_weights
from torchlethe.lightning_modules import FineTune, Retrain
from torchlethe.metrics import define_metric

NAMES = ("forget_accuracy", "remain_accuracy", "validation_accuracy", "validation_mia_entropy_logistic")


class HalfTheTestImages(DigitsDataModule):
    """The same training data with fewer images to test on."""

    def setup(self, stage=None):
        first = self.test_set is None
        super().setup(stage)
        if first:
            self.test_set = self.test_set.subset(torch.arange(len(self.test_set)) % 2 == 0)


def run(folder, kind, data, **options):
    """Train one method for an epoch; what was measured of it."""
    wrapped = UnlearningDataModule(data, ForgetFraction(0.1))
    evaluation = UnlearningEvaluation(table=False, **options)
    trainer = quiet_trainer(max_epochs=1, default_root_dir=folder, callbacks=[evaluation])
    module = kind(small_network(seed=1 if options else 0), num_classes=10, optimizer=sgd(0.05))
    trainer.fit(module, wrapped)
    save_weights(module.network, folder / "weights.safetensors")
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Retrain and a tuned network with validation images, and with fewer test images."""
    found = {}
    for name, kind in (("all", DigitsDataModule), ("half", HalfTheTestImages)):
        folder = tmp_path_factory.mktemp(name)
        data = {"validation": 150, "batch_size": 256}
        retrain = run(folder / "retrain", Retrain, kind(**data))
        options = {"reference": folder / "retrain" / "weights.safetensors"}
        found[name] = retrain, run(folder / "tuned", FineTune, kind(**data), **options)
    return found


def test_is_the_mean_difference_to_retrain(measured):
    retrain, tuned = measured["all"]
    gaps = [abs(tuned[name] - retrain[name]) for name in NAMES]
    assert tuned["validation_gap"] == pytest.approx(sum(gaps) / 4, abs=1e-9)
    assert tuned["validation_gap"] != tuned["average_gap"]
    assert "validation_gap" not in retrain


def test_does_not_look_at_test_images(measured):
    (_, tuned), (_, fewer) = measured["all"], measured["half"]
    assert tuned["test_accuracy"] != fewer["test_accuracy"]
    assert tuned["average_gap"] != fewer["average_gap"]
    assert tuned["validation_gap"] == pytest.approx(fewer["validation_gap"], abs=1e-9)


def test_needs_held_out_images(tmp_path):
    run(tmp_path / "retrain", Retrain, DigitsDataModule(batch_size=256))
    options = {"reference": tmp_path / "retrain" / "weights.safetensors"}
    found = run(tmp_path / "tuned", FineTune, DigitsDataModule(batch_size=256), **options)
    assert "average_gap" in found
    assert not any(name.startswith("validation") for name in found)


def test_both_have_a_definition():
    assert "held-out" in define_metric("validation_gap").definition
    attack = define_metric("validation_mia_entropy_logistic")
    assert attack.definition.startswith(define_metric("mia_entropy_logistic").definition)
    assert "validation samples" in attack.definition
