"""SCAR forgets a class without a remaining image in its steps, resumes, and says what it lacks."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import (
    accuracy,
    assert_same_bits,
    cosine,
    digits,
    forgetful_digits,
    norm_free_network,
    quiet_trainer,
    sgd,
    small_network,
)
from tests.lightning_modules.methods import divided, plain, unlearn
from torchlethe.data import Augmentation, ForgetClasses, ForgetIndices
from torchlethe.datamodules import PhotoPatchesDataModule, UnlearningDataModule
from torchlethe.lightning_modules import SCAR, Classifier
from torchlethe.models import features_of
from torchlethe.updates import SCARUpdate


def photos(count=240):
    return PhotoPatchesDataModule(8, 1, count=count)


def adam(lr=1e-3):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def three(**kwargs):
    return forgetful_digits(ForgetClasses([3]), **kwargs)


@pytest.fixture(scope="module")
def original():
    """A network that knows the digits."""
    module = Classifier(small_network(), 10, sgd(), cosine(8))
    quiet_trainer(max_epochs=8).fit(module, datamodule=digits())
    return module.network


def test_a_class_is_forgotten_and_the_rest_is_kept(original):
    data = three()
    module = SCAR(copy.deepcopy(original), 10, photos(1200), optimizer=adam())
    trainer = quiet_trainer(max_epochs=10)
    trainer.fit(module, datamodule=data)
    loaders = data.evaluation_loaders()
    before, after = (
        {role: accuracy(m, loaders[role], data.prepare_batch) for role in ("forget", "test_remain")}
        for m in (original, module)
    )
    assert before["forget"] > 75
    assert after["forget"] < 5
    assert after["test_remain"] > before["test_remain"] - 8
    assert trainer.global_step < 190  # it stopped by itself
    assert module.update.stopped


def test_no_step_sees_a_remaining_image_and_none_changes_what_it_finds(original):
    data = three()
    data.setup()
    forgotten = set(data.role_set("forget").indices.tolist())
    seen: list[dict] = []
    module = SCAR(copy.deepcopy(original), 10, photos(), optimizer=adam(), stop_accuracy=0)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch) or step(batch, batch_idx)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert module.reads == {"forget", "remain"}
    assert trainer.global_step == 4 == len(seen)  # 240 photographs in batches of 64
    assert all(set(batch) == {"forget", "surrogate"} for batch in seen)
    assert {index for batch in seen for index in batch["forget"]["index"].tolist()} == forgotten
    assert {index for batch in seen for index in batch["surrogate"]["index"].tolist()} == set(range(240))


def test_statistics_are_those_of_the_remaining_features(original):
    data = three()
    module = SCAR(copy.deepcopy(original), 10, photos(), stop_accuracy=0)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(module, datamodule=data)
    rule = module.update
    assert rule.gone.nonzero().flatten().tolist() == [3]
    assert rule.known.sum() == 9
    batches = [data.prepare_batch(batch) for batch in data.role_loader("remain")]
    with torch.no_grad():
        features = torch.cat([features_of(copy.deepcopy(original).eval(), batch["image"]) for batch in batches]).sqrt()
    labels = torch.cat([batch["label"] for batch in batches])
    for k in (0, 7):
        torch.testing.assert_close(rule.means[k], features[labels == k].mean(0), rtol=1e-4, atol=1e-5)


class Stop(Exception):
    """Ends a run in the middle of an epoch."""


class StopAfter(Callback):
    """Save and leave after three steps."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.file)
            raise Stop


def test_a_run_cut_off_resumes_to_the_same_bits(original, tmp_path):
    def fit(callbacks=(), **arguments):
        trainer = quiet_trainer(max_epochs=2, callbacks=list(callbacks))
        module = SCAR(copy.deepcopy(original), 10, photos(), optimizer=adam(), stop_accuracy=0.5)
        trainer.fit(module, datamodule=three(augmentation=Augmentation(crop=1)), **arguments)
        return trainer, module

    straight = fit()[1]
    with pytest.raises(Stop):
        fit([StopAfter(tmp_path / "cut.ckpt")])
    trainer, resumed = fit(ckpt_path=tmp_path / "cut.ckpt")
    assert_same_bits(resumed.network, straight.network)
    assert resumed.update.passes == straight.update.passes > 0
    stored = torch.load(tmp_path / "cut.ckpt", weights_only=True)["unlearning"]["update"]
    assert set(stored) == {"prepared", "original", "hits", "batches", "passes", "stopped"}
    assert trainer.global_step == straight.global_step
    other = SCAR(small_network(1), 10, photos(), optimizer=adam())
    with pytest.raises(ValueError, match="the checkpoint was made with the original weights"):
        quiet_trainer(max_epochs=2).fit(other, datamodule=three(), ckpt_path=tmp_path / "cut.ckpt")


def test_halves_of_a_batch_make_the_whole():
    """What two ranks do, in one process: gradients of halves, with the surrogate images that count taken together."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.body, network.head = norm_free_network().double()[:-1], nn.Linear(32, 10).double()
    image = torch.rand(40, 1, 8, 8, dtype=torch.float64)
    batch = {"image": image[:16], "label": torch.arange(16) % 3}
    rule = SCARUpdate()
    rule.configure(network)
    rule.prepare(network, {"remain": [{"image": image, "label": torch.arange(40) % 9 + 1}], "forget": [batch]})
    surrogate = {"image": torch.rand(16, 1, 8, 8, dtype=torch.float64), "label": torch.zeros(16, dtype=torch.long)}

    def gradient(part):
        step = {"forget": batch, "surrogate": surrogate}
        step = {role: {name: value[part] for name, value in values.items()} for role, values in step.items()}
        loss, logs = rule.loss(network, step, 0)
        return torch.autograd.grad(loss, list(network.parameters())), logs["surrogate_kept"]

    whole, kept = gradient(slice(None))
    halves = [gradient(slice(start, None, 2)) for start in range(2)]
    assert kept == 1  # so that the halves weigh the same
    for number, value in enumerate(whole):
        torch.testing.assert_close((halves[0][0][number] + halves[1][0][number]) / 2, value)


def test_plain_loaders_by_role_need_no_datamodule():
    def loader(count):
        return DataLoader(TensorDataset(torch.rand(count, 1, 8, 8), torch.arange(count) % 10), batch_size=8)

    loaders = {"forget": loader(16), "remain": loader(40), "surrogate": loader(24)}
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(SCAR(small_network(), 10, stop_accuracy=0), loaders)
    assert trainer.global_step == 5
    del loaders["surrogate"]
    with pytest.raises(ValueError, match="the loaders have no surrogate images, but SCAR keeps"):
        quiet_trainer(max_epochs=1).fit(SCAR(small_network(), 10), loaders)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_work(precision):
    module = SCAR(small_network(), 10, photos(), optimizer=adam())
    quiet_trainer(max_epochs=1, precision=precision).fit(module, datamodule=three())
    assert all(torch.isfinite(p).all() for p in module.network.parameters())
    assert module.update.means.dtype in (torch.float32, torch.float64)


def test_statistics_that_are_not_there_are_a_sentence():
    module = SCAR(plain(), 4, photos())
    few = ForgetIndices([index for index in range(240) if index not in (0, 24, 36)])  # all that remains is class 0
    with pytest.raises(ValueError, match=r"the classes with two or more remaining samples are \[0\], but SCAR"):
        unlearn(module, divided(few))


@pytest.mark.parametrize(
    ("surrogate", "sentence"),
    [
        (None, "surrogate is not given, but SCAR keeps the network's outputs on images from elsewhere: name a"),
        (PhotoPatchesDataModule(16, 3, count=4), r"images of shape \(3, 16, 16\), but those of the data are \(1, 8, 8"),
        (UnlearningDataModule(digits(), ForgetClasses([1])), "surrogate is a UnlearningDataModule, but must be a"),
    ],
    ids=["none", "shape", "foreign"],
)
def test_surrogates_that_cannot_serve_are_refused(surrogate, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        quiet_trainer(max_epochs=1).fit(SCAR(small_network(), 10, surrogate), datamodule=three())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"forget_weight": 0.0}, "forget_weight is 0.0, it must be above 0"),
        ({"retain_weight": -1.0}, "retain_weight is -1.0, it must be at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"power": 1.5}, r"power is 1.5, it must lie in \(0, 1\]"),
        ({"stop_accuracy": 2.0}, "stop_accuracy is 2.0"),
        ({"bn_mode": "remain"}, "bn_mode is 'remain', allowed are train and eval"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(argument, sentence):
    with pytest.raises(ValueError, match=sentence):
        SCAR(small_network(), 10, photos(), **argument)
