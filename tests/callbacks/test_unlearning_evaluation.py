import json
import sys
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.helpers import forgetful_digits, quiet_trainer, sgd, small_network
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation
from torchlethe.data import ForgetClasses
from torchlethe.functional.uncertainty import accuracy, confidence
from torchlethe.lightning_modules import Classifier
from torchlethe.metrics.evaluation import Outputs, divergence_metrics, unlearning_metrics
from torchlethe.metrics.relearning import RelearningSettings

# more than the model knows, in few steps
RELEARNING = RelearningSettings(margin=0.0, lr=0.3, batch_size=5, max_steps=4, samples=17)
SIZES = {"forget": 23, "remain": 70, "test": 41}
CLASSES = 4


class Somebodys(LightningModule):
    """A module of another project: tuple batches, dropout and BatchNorm, no notion of unlearning."""

    def __init__(self, seed=0, lr=0.05):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Flatten(), nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
            )
        self.lr, self.forwards, self.modes = lr, 0, set()

    def forward(self, image):
        self.forwards += len(image)
        self.modes.add(self.training)
        return self.network(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        time.sleep(0.05)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Loaders(dict):
    """Evaluation sets as plain tuples."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.data = {}
        for name, size in SIZES.items():
            images = torch.rand(size, 1, 3, 3, generator=generator)
            labels = (images.flatten(1) @ torch.linspace(-1, 1, 9)).argsort().argsort() * CLASSES // size
            self.data[name] = (images, labels)
        super().__init__({name: DataLoader(TensorDataset(*pair), 16) for name, pair in self.data.items()})


def train_loader(epochs_seed=0):
    images, labels = Loaders().data["remain"]
    generator = torch.Generator().manual_seed(epochs_seed)
    return DataLoader(TensorDataset(images, labels), 16, shuffle=True, generator=generator)


def read(folder, name="evaluation"):
    with np.load(folder / f"{name}.npz") as arrays:
        return json.loads((folder / f"{name}.json").read_text()), dict(arrays)


def outputs(network, name):
    images, labels = Loaders().data[name]
    with torch.no_grad():
        return Outputs(network.eval()(images), labels, torch.arange(len(labels)))


def fit(folder, callback, module=None, **kwargs):
    module = module or Somebodys()
    trainer = quiet_trainer(default_root_dir=folder, callbacks=[callback], max_epochs=2, **kwargs)
    trainer.fit(module, train_loader())
    return trainer, module


def test_a_foreign_module_is_evaluated_after_fit(tmp_path):
    before = [outputs(Somebodys().network, name) for name in ("forget", "test")]
    trainer, module = fit(tmp_path, UnlearningEvaluation(loaders=Loaders()))
    metrics, arrays = read(tmp_path)
    sets = {name: outputs(module.network, name) for name in SIZES}
    for name, value in unlearning_metrics(sets).items():
        assert metrics[name] == pytest.approx(value, abs=1e-9)
        assert trainer.callback_metrics[name].item() == pytest.approx(value, abs=1e-9)
    for name, found in sets.items():
        expected = confidence(found.logits.double(), found.labels)
        np.testing.assert_allclose(arrays[f"confidence_{name}"], expected, atol=1e-6)
        assert arrays[f"confidence_{name}"].dtype == np.float32
        assert arrays[f"index_{name}"].tolist() == list(range(SIZES[name]))
    assert metrics["original_forget_accuracy"] == accuracy(before[0].logits, before[0].labels)
    np.testing.assert_allclose(
        arrays["confidence_test_original"], confidence(before[1].logits.double(), before[1].labels), atol=1e-6
    )
    assert "confidence_remain_original" not in arrays
    assert metrics["meta"]["counts"] == SIZES
    assert metrics["meta"]["module"] == "Somebodys"
    assert metrics["run_seconds"] == pytest.approx(
        metrics["meta"]["seconds"]["prepare"] + metrics["meta"]["seconds"]["fit"]
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_each_set_passes_once_in_eval_mode(tmp_path):
    _, module = fit(tmp_path, UnlearningEvaluation(loaders=Loaders(), before=False))
    assert module.forwards == sum(SIZES.values())
    assert module.modes == {False}


def test_training_is_the_same_with_and_without_evaluation(tmp_path):
    weights = []
    for callbacks in ([], [UnlearningEvaluation(loaders=Loaders())]):
        module = Somebodys()
        module.network[2].eval()  # a method may freeze BatchNorm
        torch.manual_seed(1)  # dropout and loaders draw from the global generator
        trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=callbacks, max_epochs=2)
        trainer.fit(module, train_loader())
        assert not module.network[2].training
        assert module.network[1].training
        weights.append(module.network.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.fixture
def retrained(tmp_path):
    """Weights of a finished run with its own evaluation beside them."""
    folder = tmp_path / "retrain"
    _, module = fit(folder, UnlearningEvaluation(loaders=Loaders(), before=False), Somebodys(seed=7))
    torch.save(module.network.state_dict(), folder / "weights.pt")
    return folder, module


def test_a_reference_adds_distances_gap_and_speed_up(tmp_path, retrained):
    folder, reference = retrained
    callback = UnlearningEvaluation(
        reference=folder / "weights.pt", loaders=Loaders(), divergences=["kl", "completeness"], before=False
    )
    _, module = fit(tmp_path / "run", callback, Somebodys(seed=1))
    metrics, arrays = read(tmp_path / "run")
    ours, theirs = outputs(module.network, "forget"), outputs(reference.network, "forget")
    for name, value in divergence_metrics(ours, theirs, ["kl", "completeness"]).items():
        assert metrics[name] == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(
        arrays["confidence_forget_reference"], confidence(theirs.logits.double(), theirs.labels), atol=1e-6
    )
    known, _ = read(folder)
    names = ["forget_accuracy", "remain_accuracy", "test_accuracy", "mia_entropy_logistic"]
    gaps = [abs(metrics[name] - known[name]) for name in names]
    assert metrics["average_gap"] == pytest.approx(sum(gaps) / 4)
    assert metrics["reference_mia_confidence_svc"] == known["mia_confidence_svc"]
    assert metrics["speed_up"] == pytest.approx(known["run_seconds"] / metrics["run_seconds"])
    assert "reference_run_seconds" not in metrics
    assert 0 < metrics["tug_of_war"] <= 1


def test_the_module_keeps_its_own_network(tmp_path, retrained):
    folder, _ = retrained
    module = Somebodys(seed=1)
    network = module.network
    fit(tmp_path / "run", UnlearningEvaluation(folder / "weights.pt", folder / "weights.pt", loaders=Loaders()), module)
    assert module.network is network
    metrics, arrays = read(tmp_path / "run")
    # the same file as original and reference
    assert metrics["original_mia_entropy_logistic"] == metrics["reference_mia_entropy_logistic"]
    np.testing.assert_array_equal(arrays["confidence_forget_original"], arrays["confidence_forget_reference"])
    assert metrics["meta"]["original"]["sha256"] == metrics["meta"]["reference"]["sha256"]


def test_the_network_may_have_another_name(tmp_path, retrained):
    class Renamed(Somebodys):
        def __init__(self):
            super().__init__()
            self.model = self.network
            del self.network

        def forward(self, image):
            return self.model(image)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    folder, reference = retrained
    weights = folder / "weights.pt"
    module = Renamed()
    network = module.model
    callback = UnlearningEvaluation(weights, weights, loaders=Loaders(), attribute="model", before=False)
    fit(tmp_path / "run", callback, module)
    assert module.model is network
    theirs = outputs(reference.network, "forget")
    _, arrays = read(tmp_path / "run")
    for model in ("original", "reference"):
        expected = confidence(theirs.logits.double(), theirs.labels)
        np.testing.assert_allclose(arrays[f"confidence_forget_{model}"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="needs a module with a 'network' to load the weights into"):
        fit(tmp_path / "again", UnlearningEvaluation(weights, loaders=Loaders()), Renamed())


def test_a_request_by_class_on_real_data(tmp_path):
    data = forgetful_digits(ForgetClasses([3]), validation=0.1)
    module = Classifier(small_network(), 10, optimizer=sgd())
    callback = UnlearningEvaluation(membership=["entropy_logistic", "confidence_threshold", "simple"])
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, datamodule=data)
    metrics, arrays = read(tmp_path)
    assert metrics["meta"]["split_hash"] == data.split.hash
    counts = metrics["meta"]["counts"]
    assert counts["test_forget"] + counts["test_remain"] == counts["test"]
    parts = [metrics[f"test_{part}_accuracy"] * counts[f"test_{part}"] for part in ("forget", "remain")]
    assert sum(parts) / counts["test"] == pytest.approx(metrics["test_accuracy"])
    assert sorted(arrays["index_forget"]) == sorted(data.role_set("forget").indices)
    labels = data.role_set("remain").labels
    assert len(arrays["confidence_remain"]) == len(labels)
    for name in ("mia_entropy_logistic", "mia_confidence_threshold", "mia_simple", "validation_accuracy"):
        assert 0 <= metrics[name] <= 100


class Split:
    def __init__(self, value):
        self.hash = value


def with_split(trainer, value):
    """Give a trainer a datamodule whose split has a hash."""
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        split = Split(value)

        def train_dataloader(self):
            return train_loader()

        def evaluation_loaders(self):
            return Loaders()

        def prepare_batch(self, batch, device=None):
            image, label = batch
            return {"image": image.to(device), "label": label.to(device), "index": 1000 + torch.arange(len(label))}

    trainer.fit(Somebodys(), datamodule=Data())


def test_a_reference_of_the_same_split_is_not_passed_twice(tmp_path):
    retrain = quiet_trainer(default_root_dir=tmp_path / "a", max_epochs=1, callbacks=[UnlearningEvaluation()])
    with_split(retrain, "abc")
    torch.save(retrain.lightning_module.network.state_dict(), tmp_path / "a" / "weights.pt")
    callback = UnlearningEvaluation(tmp_path / "a" / "weights.pt", before=False)
    trainer = quiet_trainer(default_root_dir=tmp_path / "b", max_epochs=1, callbacks=[callback])
    with_split(trainer, "abc")
    # every set once by the own model, only the forget set by the reference
    assert trainer.lightning_module.forwards == sum(SIZES.values()) + SIZES["forget"]
    metrics, _ = read(tmp_path / "b")
    assert metrics["meta"]["split_hash"] == "abc"
    assert metrics["reference_remain_accuracy"] == read(tmp_path / "a")[0]["remain_accuracy"]
    other = quiet_trainer(default_root_dir=tmp_path / "c", max_epochs=1, callbacks=[callback])
    with pytest.raises(ValueError, match=r"retrained on another split \(abc…, this run has xyz…\)"):
        with_split(other, "xyz")
    assert not (tmp_path / "c").exists()


def test_a_test_is_evaluated_too(tmp_path):
    callback = UnlearningEvaluation(loaders=Loaders(), stages=["test"], filename="judged.json", membership=[])
    module = Somebodys()
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(module, train_loader())
    assert not (tmp_path / "judged.json").exists()
    trainer.test(module, Loaders()["test"], verbose=False)
    metrics, _ = read(tmp_path, "judged")
    found = outputs(module.network, "test")
    assert metrics["test_accuracy"] == accuracy(found.logits, found.labels)
    assert metrics["meta"]["stage"] == "test"
    assert not any(name.startswith("mia") for name in metrics)


def test_validation_and_evaluation_do_not_count_as_run_time(tmp_path):
    callback = UnlearningEvaluation(loaders=Loaders())
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(Somebodys(), train_loader(), Loaders()["remain"])  # 2 × 5 validation batches and 2 of the sanity check
    seconds = read(tmp_path)[0]["meta"]["seconds"]
    assert seconds["prepare"] + seconds["fit"] < 0.5  # the validation alone slept for 0.6 s
    assert seconds["evaluation"] > 0


def test_a_resumed_fit_remembers_original_and_time(tmp_path):
    first = UnlearningEvaluation(loaders=Loaders())
    trainer, _ = fit(tmp_path / "a", first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = UnlearningEvaluation(loaders=Loaders())
    again = quiet_trainer(default_root_dir=tmp_path / "b", callbacks=[second], max_epochs=3)
    again.fit(Somebodys(seed=5), train_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    (before, known), (after, arrays) = read(tmp_path / "a"), read(tmp_path / "b")
    assert after["original_forget_accuracy"] == before["original_forget_accuracy"]
    np.testing.assert_array_equal(arrays["confidence_test_original"], known["confidence_test_original"])
    assert after["meta"]["seconds"]["fit"] > before["meta"]["seconds"]["fit"]


def test_numbers_reach_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version=0)
    fit(tmp_path, UnlearningEvaluation(loaders=Loaders()), logger=logger)
    assert (tmp_path / "logs" / "version_0" / "evaluation.json").is_file()
    assert not (tmp_path / "evaluation.json").exists()
    header = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"forget_accuracy", "mia_confidence_svc", "original_test_accuracy"} <= set(header)


def test_a_fast_dev_run_evaluates_a_batch_and_writes_nothing(tmp_path):
    module = Somebodys()
    callback = UnlearningEvaluation(loaders=Loaders(), before=False)
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], fast_dev_run=1)
    trainer.fit(module, train_loader())
    assert module.forwards == 3 * 16
    assert "mia_confidence_svc" in trainer.callback_metrics
    assert not list(tmp_path.iterdir())


def test_a_diverged_model_gives_null_instead_of_an_error(tmp_path):
    fit(tmp_path, UnlearningEvaluation(loaders=Loaders()), Somebodys(lr=1e30))
    metrics, _ = read(tmp_path)
    assert metrics["mia_entropy_logistic"] is None
    assert metrics["original_forget_accuracy"] > 0


def test_the_table_shows_the_numbers(tmp_path, capsys):
    callback = UnlearningEvaluation(loaders=Loaders())
    fit(tmp_path, callback, enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "Unlearning evaluation" in shown
    assert "forget accuracy" in shown
    fit(tmp_path, UnlearningEvaluation(loaders=Loaders(), table=False), enable_progress_bar=True)
    assert "Unlearning evaluation" not in capsys.readouterr().out


def test_bf16_and_uint8_images(tmp_path):
    loaders = {
        name: DataLoader(TensorDataset((images * 255).to(torch.uint8), labels), 16)
        for name, (images, labels) in Loaders().data.items()
    }
    _, module = fit(tmp_path, UnlearningEvaluation(loaders=loaders), precision="bf16-mixed")
    images, labels = Loaders().data["remain"]
    with torch.no_grad():
        logits = module.network.eval()((images * 255).to(torch.uint8).float() / 255)
    assert read(tmp_path)[0]["remain_accuracy"] == pytest.approx(accuracy(logits, labels), abs=5)


class WrongShape(Somebodys):
    def forward(self, image):
        return self.network(image).sum(dim=1)


def refused_arguments(tmp_path):
    loaders = Loaders()
    shuffled = DataLoader(loaders["test"].dataset, 8, shuffle=True)
    sampler = DistributedSampler(loaders["test"].dataset, 1, 0, shuffle=True)
    junk = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(1)}, junk)
    return {
        "has no data: pass UnlearningDataModule": ({}, Somebodys()),
        "lacks the sets remain, test": ({"loaders": {"forget": loaders["forget"]}}, Somebodys()),
        r"loaders\['test'\] is shuffled": ({"loaders": {**loaders, "test": shuffled}}, Somebodys()),
        r"loaders\['forget'\] is shuffled": (
            {"loaders": {**loaders, "forget": DataLoader(sampler.dataset, 8, sampler=sampler)}},
            Somebodys(),
        ),
        "reference='missing.pt' does not exist": ({"loaders": loaders, "reference": "missing.pt"}, Somebodys()),
        r"WrongShape.forward\(image\) must give logits \(16, classes\)": ({"loaders": loaders}, WrongShape()),
    }


@pytest.mark.parametrize("number", range(6))
def test_wrong_input_is_refused_in_a_sentence_before_training(tmp_path, number):
    message, (arguments, module) = list(refused_arguments(tmp_path).items())[number]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, UnlearningEvaluation(**arguments), module)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"membership": ["lira"]}, "membership contains 'lira'"),
        ({"divergences": ["tv"]}, "divergences="),
        ({"stages": "fit"}, "stages='fit' must be a list"),
        ({"filename": "evaluation.txt"}, r"must end in \.json"),
        ({"svc_mode": "slow"}, "svc_mode is 'slow', allowed are auto, fast and exact"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnlearningEvaluation(**arguments)


class Sharded:
    """Loaders that a distributed sampler shares out once the process group exists."""

    def __init__(self, names):
        self.names = names

    def items(self):
        return self().items()

    def __call__(self):
        plain = Loaders()
        for name in self.names:
            dataset = plain[name].dataset
            plain[name] = DataLoader(dataset, 8, sampler=DistributedSampler(dataset, shuffle=False))
        return plain


class ShardedData(UnlearningEvaluation):
    """Two sets arrive in shares, the third whole on each rank."""

    def setup(self, trainer, pl_module, stage):
        self.loaders = Sharded(("forget", "remain"))()
        super().setup(trainer, pl_module, stage)


class FullBatch(Somebodys):
    """No dropout and BatchNorm, and a learning rate of zero: ranks stay equal without a shared batch."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES))
        nn.init.constant_(self.network[1].bias, 0.0)
        with torch.no_grad():
            self.network[1].weight.copy_(torch.linspace(-2, 2, 9 * CLASSES).sin().reshape(CLASSES, 9))


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_initialized(), reason="forks two ranks")
def test_two_ranks_equal_one(tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(FullBatch().network.state_dict(), weights)
    found = []  # of the forget set half arrives on each rank, and rank 0 relearns with all of it
    for kind, callback, settings in (
        ("one", UnlearningEvaluation(weights, loaders=Loaders(), relearning=RELEARNING), {}),
        ("two", ShardedData(weights, relearning=RELEARNING), {"devices": 2, "strategy": "ddp_fork"}),
    ):
        trainer = quiet_trainer(default_root_dir=tmp_path / kind, callbacks=[callback], max_steps=1, **settings)
        trainer.fit(FullBatch(), train_loader())
        found.append(read(tmp_path / kind))
    (one, one_arrays), (two, two_arrays) = found
    assert two["meta"]["world_size"] == 2
    assert two["meta"]["relearning"] == one["meta"]["relearning"]
    for name in ("per_class", "layers"):
        assert two.pop(name) == one.pop(name)
    for name in one.keys() - {"meta", "run_seconds"}:
        assert two[name] == pytest.approx(one[name], abs=1e-9), name
    assert one_arrays.keys() == two_arrays.keys()
    for name, values in one_arrays.items():
        np.testing.assert_allclose(two_arrays[name], values, atol=1e-6)
