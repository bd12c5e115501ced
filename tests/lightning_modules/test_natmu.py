"""NatMU under Lightning is the plain update rule, resumes to the same bits, runs on two ranks, and forgets."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import (
    accuracy,
    assert_same_bits,
    cosine,
    digits,
    forgetful_digits,
    quiet_trainer,
    sgd,
    small_network,
)
from tests.lightning_modules.natmu_ranks import run
from tests.two_ranks import run_two_ranks
from torchlethe.callbacks import ChannelsLast, CompileNetwork, HybridGrid
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.data import Augmentation, ForgetClasses, ForgetFraction, WrappedDataset
from torchlethe.datamodules import UnlearningDataModule
from torchlethe.functional.hybrids import cosine_factor
from torchlethe.io import read_state_dict
from torchlethe.lightning_modules import Classifier, FineTune, NatMU, Retrain
from torchlethe.models import head_of
from torchlethe.updates import NatMUUpdate


def adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=5e-4)


def test_the_module_is_the_plain_rule():
    data = forgetful_digits(augmentation=Augmentation(crop=1))
    module = NatMU(small_network(), 10, delta=0.1, seed=5)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)

    network, rule = small_network(), NatMUUpdate(delta=0.1, seed=5)
    loader = rule.feed.loader(data.role_set, batch_size=64, seed=data.seed)
    assert trainer.global_step == 2 * len(loader)
    (optimizer,) = rule.configure(network)
    rule.set_length(2 * len(loader), len(loader))
    rule.prepare(network, {role: [data.prepare_batch(b) for b in data.role_loader(role)] for role in rule.reads})
    network.train()
    k = 0
    for _ in range(2):
        for batch in loader:
            rule.step(network, data.prepare_batch(batch, augment=True), k)
            k += 1
    assert_same_bits(module.network, network)
    assert optimizer.param_groups[0]["lr"] == 0


def test_interrupted_and_resumed_is_the_same_run(tmp_path):
    class Stop(Exception):
        pass

    class StopAfter(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 33:
                raise Stop

    def fit(saver, **arguments):
        module = NatMU(small_network(), 10, resample=True, remain_fraction=0.8, init_linear="head")
        data = forgetful_digits(augmentation=Augmentation(crop=1))
        plugins = [AtomicCheckpointIO()]
        trainer = quiet_trainer(max_epochs=3, callbacks=saver, enable_checkpointing=bool(saver), plugins=plugins)
        trainer.fit(module, datamodule=data, **arguments)
        return module

    with pytest.raises(Stop):
        fit([StopAfter(tmp_path, "last", every_n_train_steps=7, enable_version_counter=False)])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 28
    assert len(checkpoint["unlearning"]["update"]["partners"]) == 4 * 120
    resumed, straight = fit([], ckpt_path=tmp_path / "last.ckpt"), fit([])
    assert_same_bits(resumed, straight)
    assert torch.equal(resumed.update.feed.partners, straight.update.feed.partners)


def test_two_ranks_compute_what_one_computes(tmp_path):
    run_two_ranks("tests.lightning_modules.natmu_ranks", tmp_path)
    run(60, tmp_path / "alone")
    alone, together = (read_state_dict(f / "natmu.safetensors") for f in (tmp_path / "alone", tmp_path))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-9, msg=name)


def test_a_new_head_comes_after_the_ranking():
    pairs, heads = [], []
    for init in ("none", "head", "all"):
        module = NatMU(small_network(), 10, init_linear=init, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        quiet_trainer(max_steps=1).fit(module, datamodule=forgetful_digits())
        pairs.append(module.update.feed.partners)
        start = dict(small_network().named_parameters())
        heads.append({name for name, p in module.network.named_parameters() if not torch.equal(p, start[name])})
    assert torch.equal(pairs[0], pairs[1])
    assert not heads[0]
    assert len(heads[1]) == 1
    linear = {name + ".weight" for name, m in small_network().named_modules() if isinstance(m, nn.Linear)}
    assert heads[1] < heads[2] == linear
    weight = head_of(module.network).weight
    assert float(weight.detach().std()) == pytest.approx((4 / sum(weight.shape)) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"classes": "confusion", "mask": "cutmix"},
        {"classes": "random", "redistribute": True, "pairing": "reject"},
        {"pairing": "walk", "n_hybrids": 6},
        {"lr_schedule": "constant", "mask": "linear", "n_hybrids": 1},
        {"lr_schedule": "cosine_from_full", "mask": "constant"},
    ],
    ids=str,
)
def test_every_option_trains_on_other_labels_than_its_own(arguments):
    data = forgetful_digits()
    module = NatMU(small_network(), 10, **arguments)
    quiet_trainer(max_steps=3).fit(module, datamodule=data)
    demand = module.update.feed.demand.view(120, -1)
    own = data.role_set("forget").labels
    if not arguments.get("redistribute"):
        assert not (demand == own[:, None]).any()
    assert demand.shape[1] == arguments.get("n_hybrids", 4)
    assert torch.equal(data.role_set("remain").labels[module.update.feed.partners], demand.flatten())


def test_forgotten_classes_are_never_demanded_and_a_short_supply_is_said():
    module = NatMU(small_network(), 10)
    quiet_trainer(max_steps=1).fit(module, datamodule=forgetful_digits(ForgetClasses([2, 3])))
    assert not torch.isin(module.update.feed.demand, torch.tensor([2, 3])).any()
    with pytest.warns(UserWarning, match="hybrids use a remaining image again"):
        quiet_trainer(max_steps=1).fit(NatMU(small_network(), 10), datamodule=forgetful_digits(ForgetFraction(0.6)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_works(precision):
    module = NatMU(small_network(), 10)
    quiet_trainer(precision=precision, max_steps=4).fit(module, datamodule=forgetful_digits())
    assert all(torch.isfinite(p).all() for p in module.network.parameters())


@pytest.mark.parametrize("callback", [ChannelsLast(), CompileNetwork(backend="aot_eager")], ids=["channels", "compile"])
def test_channels_last_and_compiled_networks_take_the_same_steps(callback):
    modules = [NatMU(small_network(), 10, optimizer=sgd(0.01)) for _ in range(2)]
    for module, callbacks in zip(modules, ([], [callback]), strict=True):
        quiet_trainer(max_steps=5, callbacks=callbacks).fit(module, datamodule=forgetful_digits())
    pairs = zip(*(module.network.state_dict().values() for module in modules), strict=True)
    for first, second in pairs:
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_a_collapse_ends_the_run(original):
    def guarded(lr, guard):
        module = NatMU(copy.deepcopy(original), 10, optimizer=sgd(lr), lr_schedule="constant", collapse_guard=guard)
        trainer = quiet_trainer(max_epochs=4)
        trainer.fit(module, datamodule=forgetful_digits(label_noise=None))
        return module, trainer

    with pytest.warns(
        UserWarning, match=r"NatMU stopped after step \d+: the accuracy on remaining images was .*=20 points"
    ):
        module, trainer = guarded(20.0, 20)
    per_epoch = trainer.num_training_batches
    assert trainer.global_step == per_epoch
    assert module.update.stopped
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "NatMU stopped")
        assert guarded(1e-4, 20)[1].global_step == 4 * per_epoch
        assert guarded(20.0, None)[1].global_step == 4 * per_epoch
    state = module.update.state_dict()
    again = NatMU(copy.deepcopy(original), 10, collapse_guard=20).update
    again.configure(original)
    again.load_state_dict(state)
    assert again.stopped
    assert again.accuracy_before == module.update.accuracy_before > 90
    with pytest.raises(ValueError, match=r"collapse_guard is 0, it must lie in \(0, 100\] points"):
        NatMU(original, 10, collapse_guard=0)


def test_other_projects_data_sets_need_no_datamodule():
    generator = torch.Generator().manual_seed(0)
    sets = {
        role: WrappedDataset(TensorDataset(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 10))
        for role, n in (("forget", 20), ("remain", 90))
    }
    module = NatMU(small_network(), 10)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, module.feed.loader(sets.get, batch_size=17))
    assert trainer.global_step == 10
    plain = {role: DataLoader(part.dataset, 8) for role, part in sets.items()}
    with pytest.raises(ValueError, match="NatMU mixes the images of two data sets"):
        quiet_trainer(max_epochs=1).fit(NatMU(small_network(), 10), plain)


def test_a_schedule_needs_an_end_and_arguments_have_ranges():
    with pytest.raises(ValueError, match="max_epochs and max_steps set no end"):
        quiet_trainer(max_epochs=-1).fit(NatMU(small_network(), 10), datamodule=forgetful_digits())
    for arguments, words in (
        ({"classes": "all"}, "classes is 'all', allowed are top, confusion and random"),
        ({"pairing": "walk", "redistribute": True}, "redistribute is set"),
        ({"pairing": "reject", "resample": True}, "resample is set"),
        ({"delta": 2.0}, "delta is 2.0"),
    ):
        with pytest.raises(ValueError, match=words):
            NatMU(small_network(), 10, **arguments)
    module = NatMU(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), 10, init_linear="head")
    with pytest.raises(ValueError, match="no Linear classifier"):
        quiet_trainer(max_steps=1).fit(module, datamodule=forgetful_digits())


def test_the_hybrids_can_be_looked_at(tmp_path):
    from matplotlib.image import imread

    for rows in (2, 3):
        grid = HybridGrid(rows=rows, filename=f"{rows}.png")
        trainer = quiet_trainer(max_steps=1, callbacks=[grid], default_root_dir=tmp_path)
        trainer.fit(NatMU(small_network(), 10), datamodule=forgetful_digits())
    two, three = imread(tmp_path / "2.png"), imread(tmp_path / "3.png")
    assert three.shape[0] > two.shape[0] > 300
    assert two[..., :3].std() > 0.1
    with pytest.raises(ValueError, match="HybridGrid draws the hybrids of NatMU, FineTune"):
        quiet_trainer(max_steps=1, callbacks=[HybridGrid()]).fit(
            FineTune(small_network(), 10), datamodule=forgetful_digits()
        )
    with pytest.raises(ValueError, match="rows is 0"):
        HybridGrid(rows=0)


@pytest.fixture(scope="module")
def original():
    module = Classifier(small_network(), 10, sgd(), cosine(20))
    quiet_trainer(max_epochs=20).fit(module, datamodule=digits(label_noise=None))
    return module.network


def unlearned(original, data, lr=3e-3, **arguments):
    module = NatMU(copy.deepcopy(original), 10, optimizer=adamw(lr), **arguments)
    quiet_trainer(max_epochs=5).fit(module, datamodule=data)
    return module


def amnesiac(original, data):
    """The baseline that the paper compares with: random other labels, drawn once, all data in one set."""
    network, generator = copy.deepcopy(original).train(), torch.Generator().manual_seed(0)
    parts = {
        role: data.prepare_batch(data.role_set(role)[list(range(len(data.role_set(role))))])
        for role in ("forget", "remain")
    }
    shift = torch.randint(1, 10, (len(parts["forget"]["label"]),), generator=generator)
    images = torch.cat([parts["remain"]["image"], parts["forget"]["image"]])
    labels = torch.cat([parts["remain"]["label"], (parts["forget"]["label"] + shift) % 10])
    optimizer = adamw(3e-3)(network.parameters())
    rows = [r for _ in range(5) for r in torch.randperm(len(labels), generator=generator).split(64)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: cosine_factor(k, len(rows)))
    for row in rows:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[row]), labels[row]).backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def divergence(reference, module, data):
    images = torch.cat([data.prepare_batch(batch)["image"] for batch in data.role_loader("forget")])
    p, q = (m.eval()(images).log_softmax(1) for m in (reference, module))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize(
    ("request_", "delta"), [(ForgetClasses([3]), 0.0), (ForgetFraction(0.1), -0.2)], ids=["3", "10 %"]
)
def test_natmu_comes_closer_to_retrain_than_random_labels(original, request_, delta):
    data = UnlearningDataModule(digits(label_noise=None), request_)
    retrain = Retrain(small_network(), 10, sgd(), cosine(20))
    quiet_trainer(max_epochs=20).fit(retrain, datamodule=data)
    natmu, random_labels = unlearned(original, data, delta=delta), amnesiac(original, data)
    loaders = data.evaluation_loaders()
    scores = {
        name: {role: accuracy(m, loaders[role], data.prepare_batch) for role in ("forget", "test")}
        for name, m in (("retrain", retrain), ("natmu", natmu), ("random", random_labels))
    }
    assert divergence(retrain, natmu, data) < 0.7 * divergence(retrain, random_labels, data)
    gaps = {name: abs(score["forget"] - scores["retrain"]["forget"]) for name, score in scores.items()}
    assert gaps["natmu"] <= max(gaps["random"], 1.0), scores
    assert abs(scores["natmu"]["test"] - scores["retrain"]["test"]) <= 1.5, scores
    assert accuracy(natmu, loaders["remain"], data.prepare_batch) >= 99.5


def test_a_larger_delta_forgets_more(original):
    data = UnlearningDataModule(digits(label_noise=None), ForgetClasses([3]))
    loader = data.role_loader
    left = []
    for delta in (-0.4, -0.1, 0.2):
        module = unlearned(original, data, lr=1e-3, delta=delta)
        left.append(accuracy(module, loader("forget"), data.prepare_batch))
    assert left == sorted(left, reverse=True)
    assert left[0] - left[-1] > 20
