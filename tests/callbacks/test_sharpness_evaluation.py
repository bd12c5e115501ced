import csv
import json
import sys

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from tests.helpers import digits, forgetful_digits, norm_free_network, quiet_trainer, sgd, small_network
from torchlethe.callbacks import SharpnessEvaluation, UnlearningEvaluation
from torchlethe.cli import main
from torchlethe.data import Augmentation
from torchlethe.functional import hessian_top_eigenvalues, hessian_trace, m_sharpness
from torchlethe.lightning_modules import Classifier
from torchlethe.models import MLP

CLASSES, SIZE = 4, 70
SHARPNESS = ("hessian_top_eigenvalue", "hessian_trace", "m_sharpness")


def data(size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(size, 1, 3, 3, generator=generator)
    return image, (image.flatten(1) @ torch.linspace(-1, 1, 9)).argsort().argsort() * CLASSES // size


class Somebodys(LightningModule):
    """A module of another project: tuple batches, dropout and BatchNorm."""

    def __init__(self, lr=0.05, normalised=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = [nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3)] if normalised else [nn.Tanh()]
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), *middle, nn.Linear(16, CLASSES))
            self.unused = nn.Linear(2, 2)
        self.lr = lr

    def forward(self, image):
        return self.body(image)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.body(batch[0]), batch[1]) + 0 * sum(p.sum() for p in self.unused.parameters())

    def test_step(self, batch, batch_idx):
        self.body(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(size=SIZE, batch_size=16, **kwargs):
    return DataLoader(TensorDataset(*data(size)), batch_size, **kwargs)


def shuffled():
    return loader(shuffle=True, generator=torch.Generator().manual_seed(3))


def held_out():
    return DataLoader(TensorDataset(*data(31, seed=5)), 8)


def evaluation(**kwargs):
    settings = {"samples": 40, "probes": 4, "rho": 0.1, "m": 7, "batch_size": 9}
    return SharpnessEvaluation(**(settings | kwargs))


def fit(folder, callback, module=None, train=None, **kwargs):
    module = module or Somebodys()
    callbacks = [callback] if callback else []
    trainer = quiet_trainer(**({"default_root_dir": folder, "callbacks": callbacks, "max_epochs": 2} | kwargs))
    trainer.fit(module, shuffled() if train is None else train)
    return trainer, module


def read(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())


def expected(module, image, label, **kwargs):
    """The sharpness metrics of the given samples, straight from the functions."""
    settings = {"rho": 0.1, "m": 7} | kwargs
    batches = [(image, label)]
    return {
        "hessian_top_eigenvalue": hessian_top_eigenvalues(module, batches).values.item(),
        "hessian_trace": hessian_trace(module, batches, probes=4).value.item(),
        "m_sharpness": m_sharpness(module, batches, **settings).item(),
    }


def judged(module, image, label):
    with torch.no_grad():
        logits = module.eval()(image)
    return 100 * (logits.argmax(1) == label).double().mean().item(), cross_entropy(logits, label).item()


def test_a_foreign_module_is_measured_after_a_fit(tmp_path):
    trainer, module = fit(tmp_path, evaluation(samples=None, loaders={"test": held_out()}))
    found = read(tmp_path)
    for name, value in expected(module, *data()).items():
        assert found[name] == pytest.approx(value, rel=2e-4), name
        assert trainer.callback_metrics[name].item() == found[name]
    for name, pair in (("train", data()), ("test", data(31, seed=5))):
        accuracy, loss = judged(module, *pair)
        assert found[f"{name}_accuracy"] == pytest.approx(accuracy)
        assert found[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
    meta = found["meta"]
    assert meta["counts"] == {"sharpness": SIZE, "train": SIZE, "test": 31}
    assert meta["module"] == "Somebodys"
    assert meta["settings"]["m_sharpness"] == {"rho": 0.1, "m": 7, "adaptive": None, "eta": 0.01}
    assert meta["details"]["hessian_trace"]["standard_error"] > 0
    assert meta["details"]["hessian_top_eigenvalue"]["residual"] <= 1e-4 * found["hessian_top_eigenvalue"]
    assert found["run_seconds"] == pytest.approx(meta["seconds"]["prepare"] + meta["seconds"]["fit"])
    assert not list(tmp_path.glob("*.tmp"))


def test_the_subset_is_fixed_and_batches_do_not_matter(tmp_path):
    found = []
    for number, batch_size in enumerate((9, 64)):
        train = loader(batch_size=(16, 5)[number])
        fit(
            tmp_path / str(number),
            evaluation(batch_size=batch_size),
            train=train,
            max_steps=1,
            module=Somebodys(lr=0.0, normalised=False),
        )
        found.append(read(tmp_path / str(number)))
    for name in SHARPNESS:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    assert found[0]["meta"]["counts"]["sharpness"] == 40
    fit(tmp_path / "other", evaluation(seed=1), max_steps=1, module=Somebodys(lr=0.0, normalised=False))
    assert read(tmp_path / "other")["m_sharpness"] != pytest.approx(found[0]["m_sharpness"], rel=1e-3)


def test_training_is_the_same_with_and_without(tmp_path):
    weights = []
    for callback in (None, evaluation()):
        module = Somebodys()
        module.body[2].eval()  # a method may freeze BatchNorm
        torch.manual_seed(1)  # dropout and loaders draw from the global generators
        fit(tmp_path, callback, module, loader(shuffle=True))
        assert not module.body[2].training
        assert module.body[4].training
        weights.append({**module.state_dict(), **{f"{n}.grad": p.grad for n, p in module.named_parameters()}})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_test_is_measured_in_spite_of_inference_mode(tmp_path):
    module = Somebodys()
    callback = evaluation(stages=["test"], samples=None, loaders={"train": loader()}, filename="judged.json")
    trainer, _ = fit(tmp_path, callback, module)
    assert not (tmp_path / "judged.json").exists()
    trainer.test(module, held_out(), verbose=False)
    found = read(tmp_path, "judged.json")
    for name, value in expected(module, *data()).items():
        assert found[name] == pytest.approx(value, rel=2e-4), name
    assert found["test_accuracy"] == pytest.approx(judged(module, *data(31, seed=5))[0])
    assert found["meta"]["stage"] == "test"
    alone = quiet_trainer(default_root_dir=tmp_path, callbacks=[evaluation()])
    with pytest.raises(ValueError, match="found no training data: pass it loaders="):
        alone.test(Somebodys(), held_out(), verbose=False)


@pytest.mark.parametrize("wrapped", [False, True])
def test_lethes_datamodules_give_plain_training_images(tmp_path, wrapped):
    settings = {"augmentation": Augmentation(crop=2), "eval_batch_size": 100, "validation": 0.1}
    datamodule = forgetful_digits(**settings) if wrapped else digits(**settings)
    module = Classifier(small_network(), 10, optimizer=sgd())
    trainer = quiet_trainer(
        default_root_dir=tmp_path, callbacks=[evaluation(samples=None, metrics=["m_sharpness"])], max_epochs=1
    )
    trainer.fit(module, datamodule=datamodule)
    train = datamodule.role_set("train") if wrapped else datamodule.train_set
    batch = datamodule.prepare_batch(train[list(range(len(train)))])
    found = read(tmp_path)
    accuracy, loss = judged(module, batch["image"], batch["label"])
    assert found["train_accuracy"] == pytest.approx(accuracy)
    assert found["train_loss"] == pytest.approx(loss, rel=1e-5)
    sharpness = m_sharpness(module, [(batch["image"], batch["label"])], rho=0.1, m=7).item()
    assert found["m_sharpness"] == pytest.approx(sharpness, rel=1e-3)
    assert found["meta"]["counts"] == {"sharpness": len(train), "train": len(train), "test": 597}


class Pictures(Dataset):
    """A data set with transforms, as torchvision's."""

    def __init__(self, train, transform=None):
        self.image, self.label = data() if train else data(31, seed=5)
        self.transform = transform

    def __len__(self):
        return len(self.label)

    def __getitem__(self, position):
        image = self.image[position]
        return self.transform(image) if self.transform else image, int(self.label[position])


class Foreign(LightningDataModule):
    """Augments in the data set and normalises on the device, in training with noise."""

    def setup(self, stage):
        if stage == "fit":
            self.train = Pictures(True, lambda image: image + torch.rand_like(image))
        if stage == "test":
            self.test = Pictures(False)

    def train_dataloader(self):
        return DataLoader(self.train, 16, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, 16)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        noise = torch.rand(1) if self.trainer.training else 0.5
        return [batch[0] - noise, batch[1]]


def test_others_augmentation_is_left_out(tmp_path):
    module = Somebodys()
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[evaluation(samples=None)], max_epochs=1)
    trainer.fit(module, datamodule=Foreign())
    found = read(tmp_path)
    for name, (image, label) in (("train", data()), ("test", data(31, seed=5))):
        assert found[f"{name}_loss"] == pytest.approx(judged(module, image - 0.5, label)[1], rel=1e-5)
    image, label = data()
    for name, value in expected(module, image - 0.5, label).items():
        assert found[name] == pytest.approx(value, rel=2e-4), name


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(zip(*data(), strict=True)))


def test_streams_and_samplers(tmp_path):
    image, label = data()
    for number, (train, rows) in enumerate(
        [
            (DataLoader(Stream(), 16), torch.arange(40)),
            (
                DataLoader(TensorDataset(image, label), 16, sampler=SubsetRandomSampler(range(5, 45))),
                torch.arange(5, 45),
            ),
        ]
    ):
        _, module = fit(tmp_path / str(number), evaluation(), train=train)
        found = read(tmp_path / str(number))
        for name, value in expected(module, image[rows], label[rows]).items():
            assert found[name] == pytest.approx(value, rel=2e-4), name
        assert found["meta"]["counts"]["train"] == (SIZE, 40)[number]


def test_precision_logger_and_loss(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version=0)
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    _, module = fit(tmp_path, evaluation(samples=None, loss=loss), precision="bf16-mixed", logger=logger)
    folder = tmp_path / "logs" / "version_0"
    found = read(folder)
    value = m_sharpness(module, [data()], rho=0.1, m=7, loss=loss).item()  # no autocast
    assert found["m_sharpness"] == pytest.approx(value, rel=1e-3)
    assert found["meta"]["settings"]["loss"] == "CrossEntropyLoss()"
    assert set(SHARPNESS) <= set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    assert not (tmp_path / "evaluation.json").exists()
    _, double = fit(tmp_path / "double", evaluation(samples=None), precision="64-true")
    assert read(tmp_path / "double")["m_sharpness"] == pytest.approx(
        m_sharpness(double, [(data()[0].double(), data()[1])], rho=0.1, m=7).item(), rel=1e-9
    )


def test_the_series_that_a_module_logs_keep_their_unit(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version=0)
    callback = evaluation(metrics=["m_sharpness"])
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=1, logger=logger)
    trainer.fit(Classifier(small_network(), 10, optimizer=sgd()), datamodule=digits(subset=200))
    folder = tmp_path / "logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["train_accuracy"]) for row in rows if row["train_accuracy"]]
    assert shares
    assert max(shares) <= 1
    assert [float(row["m_sharpness"]) for row in rows if row["m_sharpness"]] == [read(folder)["m_sharpness"]]
    assert read(folder)["train_accuracy"] > 1


def test_fast_dev_run_divergence_and_selection(tmp_path):
    trainer, _ = fit(tmp_path / "a", evaluation(), fast_dev_run=1)
    assert trainer.callback_metrics["hessian_top_eigenvalue"].isfinite()
    assert not (tmp_path / "a").exists()
    diverged = Somebodys()
    nn.init.constant_(diverged.body[1].weight, torch.nan)
    fit(tmp_path / "b", evaluation(), diverged)
    assert [read(tmp_path / "b")[name] for name in SHARPNESS] == [None] * 3
    fit(tmp_path / "c", evaluation(metrics=["m_sharpness"], accuracy=[], m=None))
    assert read(tmp_path / "c").keys() == {"m_sharpness", "run_seconds", "meta"}


def test_a_resumed_fit_remembers_its_time(tmp_path):
    trainer, _ = fit(tmp_path / "a", evaluation())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = quiet_trainer(default_root_dir=tmp_path / "b", callbacks=[evaluation()], max_epochs=3)
    again.fit(Somebodys(), shuffled(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert read(tmp_path / "b")["run_seconds"] > read(tmp_path / "a")["run_seconds"]


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_initialized(), reason="forks two ranks")
@pytest.mark.parametrize("m", [7, None])
def test_two_ranks_equal_one(tmp_path, m):
    found = []
    for kind, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        callback = evaluation(loaders={"test": held_out()}, m=m, samples=38)  # 6 groups, the last one short
        fit(
            tmp_path / kind, callback, Somebodys(lr=0.0, normalised=False), max_steps=1, precision="64-true", **settings
        )
        found.append(read(tmp_path / kind))
    one, two = found
    assert two["meta"]["world_size"] == 2
    assert two["meta"]["counts"] == one["meta"]["counts"] == {"sharpness": 38, "train": SIZE, "test": 31}
    for name in one.keys() - {"meta", "run_seconds"}:
        assert two[name] == pytest.approx(one[name], rel=1e-9), name


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_initialized(), reason="forks two ranks")
def test_two_ranks_equal_one_on_lethes_data(tmp_path):
    found = []
    for kind, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        module = Classifier(norm_free_network(), 10, optimizer=sgd(0.0)).double()
        settings |= {"precision": "64-true", "max_steps": 1, "default_root_dir": tmp_path / kind}
        trainer = quiet_trainer(callbacks=[evaluation(samples=31)], **settings)
        trainer.fit(module, datamodule=digits(subset=80, eval_batch_size=100))
        found.append(read(tmp_path / kind))
    one, two = found
    assert two["meta"]["world_size"] == 2
    assert two["meta"]["counts"] == one["meta"]["counts"] == {"sharpness": 31, "train": 80, "test": 597}
    for name in one.keys() - {"meta", "run_seconds"}:
        assert two[name] == pytest.approx(one[name], rel=1e-9), name


def test_the_command_writes_the_file(tmp_path, capsys):
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "Classifier",
            "init_args": {
                "network": {"class_path": "torchlethe.models.MLP", "init_args": {"hidden": [16]}},
                "num_classes": 10,
            },
        },
        "data": {"class_path": "DigitsDataModule"},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "SharpnessEvaluation",
                    "init_args": {
                        "samples": 200,
                        "probes": 4,
                        "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
                    },
                }
            ],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 0
    found = read(tmp_path)
    names = {*SHARPNESS, "train_accuracy", "train_loss", "test_accuracy", "test_loss", "run_seconds"}
    assert found.keys() == {*names, "meta"}
    assert all(isinstance(found[name], float) for name in names)
    assert 30 < found["test_accuracy"] <= 100
    assert found["hessian_top_eigenvalue"] > 0
    assert (tmp_path / "weights.safetensors").is_file()


class Vectors(Somebodys):
    def forward(self, image):
        return self.body(image).sum(1)


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image):
        ctx.save_for_backward(image)
        return image.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class CustomKernel(Somebodys):
    def forward(self, image):
        return self.body[-1](Detached.apply(self.body[:-1](image)))


class Half(Somebodys):
    def configure_model(self):
        self.body.to(torch.bfloat16)

    def forward(self, image):
        return self.body(image.bfloat16())

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not start")


@pytest.mark.parametrize(
    ("module", "arguments", "train", "message"),
    [
        (Vectors, {}, None, r"Vectors\.forward\(image\) must give logits \(1, classes\), got shape \(1,\)"),
        (
            CustomKernel,
            {},
            None,
            "product is not symmetric: if a Hessian's, some operation lacks its second derivative",
        ),
        (Half, {}, None, "is bfloat16, but second derivatives need float32 or float64"),
        (Somebodys, {"loss": nn.CrossEntropyLoss(reduction="none")}, None, "loss gives a tensor"),
        (Somebodys, {}, {"a": 0, "b": 0}, "found several training loaders: pass it loaders="),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, module, arguments, train, message):
    train = train and {name: loader() for name in train}
    module = module()
    before = {name: value.clone() for name, value in module.state_dict().items() if "body" not in name}
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, evaluation(**arguments), module, train)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_two_evaluations_must_not_share_a_file(tmp_path):
    loaders = dict.fromkeys(("forget", "remain", "test"), held_out())
    other = UnlearningEvaluation(loaders=loaders)
    with pytest.raises(ValueError, match=r"filename='evaluation\.json' of SharpnessEvaluation is also that of Unlearn"):
        fit(tmp_path, None, callbacks=[other, evaluation()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["sharpness"]}, r"metrics=\['sharpness'\] must be a list out of hessian_top_eigenvalue, "),
        ({"accuracy": "train"}, "accuracy='train' must be a list out of train, test"),
        ({"stages": ["validate"]}, r"stages=\['validate'\] must be a list out of fit, test"),
        ({"loaders": {"val": None}}, r"loaders=\['val'\] must be a list out of train, test"),
        ({"filename": "evaluation.yaml"}, r"filename='evaluation\.yaml' must end in \.json"),
        ({"samples": 0}, "samples is 0, it must be above 0"),
        ({"batch_size": 0}, "batch_size is 0, it must be above 0"),
        ({"rho": 0}, "rho is 0, it must be above 0"),
        ({"probes": 0}, "probes is 0, it must be above 0"),
        ({"max_sweeps": 0}, "max_sweeps is 0, it must be above 0"),
        ({"adaptive": "all"}, "adaptive is 'all', allowed are None, w2 and eta"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessEvaluation(**arguments)


def test_the_network_of_a_lethe_module_has_the_same_sharpness_as_the_module():
    module = Classifier(MLP(hidden=[8]), 10)
    batch = [(torch.rand(20, 1, 8, 8), torch.randint(10, (20,)))]
    assert m_sharpness(module, batch) == m_sharpness(module.network, batch)
