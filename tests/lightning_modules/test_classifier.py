"""The classifier learns, composes with the Trainer's flags and refuses what does not fit."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same_bits, cosine, digits, quiet_trainer, sgd, small_network
from torchlethe.io import save_weights
from torchlethe.lightning_modules import Classifier
from torchlethe.models import SmallCNN


def fit(module=None, datamodule=None, **arguments):
    module = module or Classifier(small_network(), 10, sgd())
    trainer = quiet_trainer(**({"max_epochs": 1} | arguments))
    trainer.fit(module, datamodule=datamodule or digits())
    return module, trainer


def test_it_learns_digits():
    module, trainer = fit(Classifier(small_network(), 10, sgd(), cosine(6)), digits(label_noise=None), max_epochs=6)
    (scores,) = trainer.test(module, datamodule=digits(label_noise=None), verbose=False)
    assert scores["test_accuracy"] > 0.96
    assert 0 <= scores["test_calibration_error"] < 0.1
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize(
    "flags", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str
)
def test_trainer_flags_work(flags):
    _, trainer = fit(**flags)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    assert trainer.global_step == (10 if "accumulate_grad_batches" in flags else 19)


def test_clipping_bounds_the_step():
    start = small_network()
    module, _ = fit(
        Classifier(small_network(), 10, lambda p: torch.optim.SGD(p, lr=1.0)), gradient_clip_val=1e-3, max_steps=1
    )
    moved = sum(
        float((a - b).square().sum()) for a, b in zip(module.network.parameters(), start.parameters(), strict=True)
    )
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_mixup_is_a_function_of_seed_and_step():
    def mixed(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        return fit(Classifier(small_network(), 10, sgd(), mixup=0.4, seed=seed), max_steps=3)[0]

    assert_same_bits(mixed(1), mixed(1))
    with pytest.raises(AssertionError):
        assert_same_bits(mixed(1), mixed(2))


def test_plain_loaders_of_tuples_work():
    data = DataLoader(TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 10), batch_size=16)
    trainer = quiet_trainer(max_epochs=1)
    module = Classifier(small_network(), 10, sgd())
    trainer.fit(module, data, data)
    assert trainer.global_step == 2
    (scores,) = trainer.test(module, data, verbose=False)
    assert 0 <= scores["test_accuracy"] <= 1
    predictions = trainer.predict(module, DataLoader(TensorDataset(torch.rand(3, 1, 8, 8))))
    assert predictions[0]["logits"].shape == (1, 10)


def test_hyper_parameters_are_plain_values(tmp_path):
    module, trainer = fit(Classifier(small_network(), 10, sgd(), label_smoothing=0.1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["label_smoothing"] == 0.1
    assert saved["num_classes"] == 10
    assert "network" not in saved
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", network=small_network(1), weights_only=True)
    assert_same_bits(loaded.network, module.network)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_classes": 1}, "num_classes is 1, it must be at least 2"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0, it must lie in \[0, 1\)"),
        ({"mixup": -0.1}, "mixup is -0.1, it must be at least 0"),
        ({"weights": "absent.ckpt"}, "weights 'absent.ckpt' do not exist"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Classifier(small_network(), **({"num_classes": 10} | arguments))


def test_weights_with_another_head_are_refused(tmp_path):
    save_weights(SmallCNN(in_channels=1, image_size=8, num_classes=7), tmp_path / "seven.safetensors")
    with pytest.raises(ValueError, match=r"do not fit SmallCNN: wrong shape: .* \(file \(7, .*network \(10, "):
        Classifier(small_network(), 10, weights=tmp_path / "seven.safetensors")


def test_uint8_images_and_other_integer_labels_work_as_they_are():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    data = DataLoader(TensorDataset(images, torch.arange(32, dtype=torch.int32) % 10), batch_size=16)
    trainer = quiet_trainer(max_epochs=1)
    module = Classifier(small_network(), 10, sgd())
    trainer.fit(module, data)
    parts = trainer.predict(module, DataLoader(TensorDataset(images), batch_size=20))
    assert torch.cat([part["index"] for part in parts]).tolist() == list(range(32))
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(parts[0]["logits"], module(images[:20].float() / 255))


@pytest.mark.parametrize(("label", "sentence"), [(12, r"a label is 12, with num_classes=10"), (-3, "a label is -3")])
def test_a_label_out_of_range_is_a_sentence(label, sentence):
    data = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, label, 2])), batch_size=4)
    with pytest.raises(ValueError, match=sentence):
        quiet_trainer(max_epochs=1).fit(Classifier(small_network(), 10), data)


@pytest.mark.parametrize(
    ("network", "num_classes", "sentence"),
    [
        (
            SmallCNN(in_channels=1, image_size=8, num_classes=7),
            10,
            "the network's head has 7 outputs, num_classes is 10",
        ),
        (SmallCNN(in_channels=1, image_size=8, num_classes=7), 7, "the data has 10 classes, num_classes is 7"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), 10, r"logits of shape \(64, 9\), expected \(batch, 10\)"),
    ],
)
def test_network_data_and_num_classes_must_agree(network, num_classes, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(Classifier(network, num_classes, sgd()))
