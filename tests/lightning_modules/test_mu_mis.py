"""MU-Mis under Lightning: reads the forget set only, is the plain rule, stops, resumes, and forgets."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

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
from tests.two_ranks import one_of_two_ranks, run_two_ranks
from torchlethe.callbacks import CompileNetwork
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.data import Augmentation, ForgetClasses, ForgetIndices, PositionedLoader
from torchlethe.datamodules import UnlearningDataModule
from torchlethe.io import read_state_dict, save_weights
from torchlethe.lightning_modules import Classifier, MUMis
from torchlethe.metrics import InputSensitivity
from torchlethe.updates import MUMisUpdate

pytestmark = pytest.mark.filterwarnings("ignore:nothing to forget", "ignore:the irrelevant sensitivity rose")


class OnlyForgotten(Dataset):
    """Images of which only the first 20 may be looked at."""

    targets = torch.arange(60) % 10

    def __len__(self):
        return 60

    def __getitem__(self, position):
        if position >= 20:
            raise AssertionError(f"the remaining sample {position} was read")
        return torch.full((1, 8, 8), position / 20), int(self.targets[position])


class Guarded(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(OnlyForgotten(), batch_size=8)

    def test_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=8)


def test_no_remaining_sample_is_read():
    data = UnlearningDataModule(Guarded(), ForgetIndices(range(20)))
    module = MUMis(small_network(), 10, steps=7, min_dip=1.0, weighting="hinge")
    before = copy.deepcopy(module.network.state_dict())
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data)
    assert module.reads == {"forget"}
    assert trainer.global_step == 7
    assert any(not torch.equal(value, before[name]) for name, value in module.network.state_dict().items())
    with pytest.raises(AssertionError, match="the remaining sample"):
        next(iter(data.role_loader("remain")))


def test_the_module_is_the_plain_rule_on_images_that_are_not_augmented():
    data = forgetful_digits(augmentation=Augmentation(crop=2))
    module = MUMis(small_network(), 10, steps=5, min_dip=1.0)
    network, rule = small_network(), MUMisUpdate(steps=5, min_dip=1.0)
    modes = [part.training for part in module.network.eval().modules()]
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 5
    assert modes == [part.training for part in module.network.modules()]

    rule.configure(network)
    rule.prepare(network, {"forget": [data.prepare_batch(b) for b in data.role_loader("forget")]})
    loader = PositionedLoader(data.role_set("forget"), batch_size=64, shuffle=True, seed=data.seed)
    batches = [data.prepare_batch(batch) for _ in range(3) for batch in loader]
    for k in range(5):
        rule.step(network, batches[k], k)
    rule.finish(network)
    assert_same_bits(module.network, network)


def test_loaders_of_other_projects_need_no_datamodule():
    loader = DataLoader(TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10), batch_size=8)
    for given in (loader, {"forget": loader}):
        trainer = quiet_trainer()
        trainer.fit(MUMis(small_network(), 10, steps=4, min_dip=1.0), given)
        assert trainer.global_step == 4


def test_mixed_precision_is_float32_and_half_precision_is_refused():
    networks = []
    for precision in ("32-true", "bf16-mixed"):
        module = MUMis(small_network(), 10, steps=3, min_dip=1.0)
        quiet_trainer(precision=precision).fit(module, datamodule=forgetful_digits())
        networks.append(module.network)
    assert all(p.dtype is torch.float32 for p in networks[1].parameters())
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(ValueError, match=r"MU-?Mis needs .*32") as caught:
            quiet_trainer(precision=precision).fit(MUMis(small_network(), 10), datamodule=forgetful_digits())
        assert "\n" not in str(caught.value)


def test_a_compiled_network_runs_as_written():
    networks = []
    for callbacks in ([], [CompileNetwork(backend="aot_eager")]):
        module = MUMis(small_network(), 10, steps=3, min_dip=1.0)
        quiet_trainer(callbacks=callbacks).fit(module, datamodule=forgetful_digits())
        networks.append(module.network)
    assert_same_bits(networks[0].state_dict(), {k: v.clone() for k, v in networks[1].state_dict().items()})


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.steps:
            raise Stop


def test_a_run_cut_off_within_an_epoch_resumes_to_the_same_bits(tmp_path):
    def run(folder, stop=None, resume=None):
        module = MUMis(small_network(), 10, steps=12, min_dip=1.0, weighting="hinge", delta=1.1, monitor_every=4)
        callbacks = [ModelCheckpoint(folder, "last", every_n_train_steps=7, enable_version_counter=False)]
        callbacks += [StopAfter(stop)] if stop else []
        trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
        trainer.fit(module, datamodule=forgetful_digits(), ckpt_path=resume)
        return module

    with pytest.raises(Stop):
        run(tmp_path, stop=9)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 7
    assert state["unlearning"]["update"]["unseen"] == 3
    resumed, straight = run(tmp_path, resume=tmp_path / "last.ckpt"), run(tmp_path / "straight")
    assert resumed.global_step == straight.global_step == 12
    assert_same_bits(resumed.network, straight.network)
    assert resumed.update.ratio_min == straight.update.ratio_min


def test_a_run_that_stopped_itself_stays_stopped(tmp_path):
    module = MUMis(small_network(), 10, steps=50, rho=3.0, monitor_every=2)
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=forgetful_digits())
    assert module.update.stop_reason == "guard"
    assert trainer.global_step < 50
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    again = MUMis(small_network(1), 10, steps=50, rho=3.0, monitor_every=2)
    trainer = quiet_trainer()
    trainer.fit(again, datamodule=forgetful_digits(), ckpt_path=tmp_path / "done.ckpt")
    assert again.update.stop_reason == "guard"
    assert_same_bits(again.network, module.network)


@pytest.fixture(scope="module")
def original():
    """A network that was trained on all digits."""
    module = Classifier(small_network(), 10, sgd(), cosine(15))
    quiet_trainer(max_epochs=15).fit(module, datamodule=digits(label_noise=None))
    return module


def test_the_hinge_holds_where_the_plain_loss_runs_away(original):
    data = forgetful_digits(ForgetClasses([3]), label_noise=None, batch_size=32)
    data.setup()
    batches = [data.prepare_batch(batch) for batch in data.role_loader("forget")]
    ratios = {}
    for weighting in ("plain", "hinge"):
        network = copy.deepcopy(original.network)
        rule = MUMisUpdate(
            steps=200,
            weighting=weighting,
            delta=1.1,
            min_dip=1.0,
            guard=float("inf"),
            monitor_every=40,
            monitor_samples=64,
        )
        rule.configure(network)
        rule.prepare(network, {"forget": batches})
        found = [rule.step(network, batches[k % len(batches)], k).get("mis/ratio", 1.0) for k in range(200)]
        ratios[weighting] = float("inf") if rule.stopped else max(found)
    assert ratios["hinge"] < 1.4, ratios
    assert ratios["plain"] > 1.6, ratios


def test_it_forgets_a_digit_and_keeps_the_others(original):
    data = forgetful_digits(ForgetClasses([3]), label_noise=None)
    module = MUMis(copy.deepcopy(original.network), 10)
    quiet_trainer().fit(module, datamodule=data)
    assert module.update.stop_reason in ("guard", "recovered")
    loaders, scores, sensitivity = data.evaluation_loaders(), {}, {}
    for name, network in (("before", original.network), ("after", module.network)):
        parts = ("test_forget", "test_remain")
        scores[name] = [accuracy(network, loaders[part], data.prepare_batch) for part in parts]
        metric = InputSensitivity(network, 10)
        for batch in data.role_loader("forget"):
            prepared = data.prepare_batch(batch)
            metric.update(prepared["image"], prepared["label"])
        sensitivity[name] = float(metric.compute())
    assert sensitivity["after"] < 0.85 * sensitivity["before"]
    assert scores["after"][0] <= scores["before"][0] - 25, scores
    assert scores["after"][1] >= scores["before"][1] - 4, scores


def joined(batch_size, folder, **arguments):
    """A short run without BatchNorm; writes the weights and the ratio of the last look."""
    module = MUMis(norm_free_network().double(), 10, steps=6, min_dip=1.0, monitor_every=3, weighting="hinge")
    trainer = quiet_trainer(precision="64-true", **arguments)
    trainer.fit(module, datamodule=forgetful_digits(ForgetIndices(range(30)), batch_size=batch_size))
    if trainer.is_global_zero:
        state = dict(module.network.state_dict()) | {"ratio": torch.tensor(module.update.ratio_min)}
        save_weights(state, folder / "mu_mis.safetensors")


def test_two_ranks_compute_what_one_process_computes(tmp_path):
    run_two_ranks("tests.lightning_modules.test_mu_mis", tmp_path)
    together = read_state_dict(tmp_path / "mu_mis.safetensors")
    (tmp_path / "alone").mkdir()
    joined(10, tmp_path / "alone")
    alone = read_state_dict(tmp_path / "alone" / "mu_mis.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-10)


if __name__ == "__main__":
    with one_of_two_ranks() as ranks:
        joined(5, Path(sys.argv[1]), **ranks())
