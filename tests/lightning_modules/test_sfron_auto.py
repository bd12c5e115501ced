"""SFRon's search for its strength and its dual optimizers in a Trainer and by the command."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import ROOT
from tests.helpers import assert_same_bits, forgetful_digits, quiet_trainer, small_network
from tests.lightning_modules.runs import train
from torchlethe.callbacks.run_clock import RunClock
from torchlethe.cli import main
from torchlethe.data import ForgetClasses
from torchlethe.io import save_weights
from torchlethe.lightning_modules import SFRon
from torchlethe.updates.strength import mean_loss

QUICK = {"steps": 8, "forget_every": 4, "alpha": "auto", "auto_alpha_steps": 8, "auto_alpha_target": 2.33}


def test_a_resumed_run_does_not_probe_again_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    straight = train("sfron_auto", tmp_path / "straight")
    assert straight.update.alpha == straight.update.alpha

    class Stop(Exception):
        pass

    class StopAfter(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 17:
                raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("tests.lightning_modules.runs.ModelCheckpoint", StopAfter)
        with pytest.raises(Stop):
            train("sfron_auto", tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["unlearning"]["update"]
    assert saved["alpha"] == straight.update.alpha
    with monkeypatch.context() as patch:
        patch.setattr("torchlethe.updates.sfron.find_strength", lambda *args: pytest.fail("it probed again"))
        resumed = train("sfron_auto", tmp_path, resume=True)
    assert resumed.update.alpha == straight.update.alpha
    assert resumed.update.alpha_trials == straight.update.alpha_trials
    assert_same_bits(resumed, straight)


def test_the_run_is_that_with_the_number_found():
    module = SFRon(small_network(), 10, **QUICK)
    quiet_trainer().fit(module, datamodule=forgetful_digits())
    assert len(module.update.alpha_trials) > 1
    given = {"steps": 8, "forget_every": 4, "alpha": module.update.alpha}
    other = SFRon(small_network(), 10, **given)
    quiet_trainer().fit(other, datamodule=forgetful_digits())
    assert_same_bits(module.network, other.network)


def test_a_whole_trial_is_the_run_that_follows():
    """With as many iterations as the run, the trial at the strength found sees the run's batches in their order."""
    module = SFRon(small_network(), 10, **(QUICK | {"auto_alpha_target": 1e-9}))  # reached before the first step
    trials, inner = [], module.update.prepare

    def prepare(network, loaders):
        logs = inner(network, loaders)
        trials.append(module.update._trial(network, loaders, 25.0))
        return logs

    module.update.prepare = prepare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer().fit(module, datamodule=forgetful_digits())
    data = forgetful_digits()
    data.setup()
    batches = [data.prepare_batch(batch) for batch in data.role_loader("forget")]
    assert mean_loss(module.network, batches)[0] == pytest.approx(trials[0], abs=1e-7)


def test_its_time_counts_as_preparation():
    clock = RunClock()
    module = SFRon(small_network(), 10, **QUICK)
    seen = []
    module.network.register_forward_hook(lambda *args: seen.append(clock.clock.running))
    quiet_trainer(callbacks=[clock]).fit(module, datamodule=forgetful_digits())
    # two Fisher passes, the loss before, and the trials; then eight steps of which two forget
    assert seen.count("fit") == 10
    assert seen.count("prepare") > 2 * 10
    assert seen.index("fit") > max(i for i, lap in enumerate(seen) if lap == "prepare")


def test_plain_loaders_by_role_serve_the_trials():
    generator = torch.Generator().manual_seed(0)
    loaders = {
        role: DataLoader(
            TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 10), batch_size=8, shuffle=True, generator=generator
        )
        for role, n in (("forget", 16), ("remain", 40), ("validation", 20))
    }
    module = SFRon(small_network(), 10, **(QUICK | {"auto_alpha_target": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer().fit(module, loaders)
    assert module.update.alpha > 0
    with pytest.raises(ValueError, match="SFRon reads validation too"):
        quiet_trainer().fit(module, {role: loaders[role] for role in ("forget", "remain")})


def test_what_it_needs_is_said_before_training():
    before = small_network()
    module = SFRon(small_network(), 10, alpha="auto")
    with pytest.raises(
        ValueError, match=r"needs held-out images: set `validation` of the data .* or give auto_alpha_t"
    ):
        quiet_trainer().fit(module, datamodule=forgetful_digits())
    with pytest.raises(ValueError, match="all of class 3 is to be forgotten"):
        quiet_trainer().fit(module, datamodule=forgetful_digits(ForgetClasses([3]), validation=0.1))
    assert_same_bits(module.network, before)


def test_dual_optimizers_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    save_weights(small_network(), tmp_path / "weights.safetensors")
    files = ["configs/digits/forget_random.yaml", "configs/digits/sfron_dual.yaml"]
    words = [word for file in files for word in ("--config", file)]
    words += [f"--model.weights={tmp_path / 'weights.safetensors'}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *words, "--model.steps=10", "--trainer.enable_progress_bar=false"]) == 0
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    _, remain, forget = checkpoint["optimizer_states"]  # the first counts batches
    assert remain["param_groups"][0]["momentum"] == 0.9
    assert forget["param_groups"][0]["betas"] == (0.9, 0.999)
    assert forget["param_groups"][0]["weight_decay"] == 0.05
    # both follow the cosine over the run: at its last step, k = 9 of 10, 2.4 % of the rate is left
    shares = [group["param_groups"][0] for group in (remain, forget)]
    assert [group["lr"] / group["initial_lr"] for group in shares] == pytest.approx([0.02447] * 2, rel=1e-3)
    assert forget["state"][0]["step"] == 2
    assert "momentum_buffer" in remain["state"][0]
