"""The callback among everything else that a run has: resume, interrupts, averaging, compilation, the command."""

import csv
import shlex

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.callbacks.sharpness_runs import SGD, Foreign, fit, loader, mlp
from tests.helpers import assert_same_bits, cosine, digits, quiet_trainer, sgd, small_network
from torchlethe.callbacks import CompileNetwork, NonFiniteError, NonFiniteGuard, SharpnessAware
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.cli import main
from torchlethe.data import Augmentation
from torchlethe.lightning_modules import Classifier


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)


def momentum(parameters):
    return torch.optim.SGD(parameters, **SGD)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [momentum, adamw], ids=["SGD", "AdamW"])
@pytest.mark.parametrize(("method", "options"), [("fsam", {}), ("looksam", {"interval": 4}), ("sam", {"interval": 4})])
def test_resume_is_exact(method, options, optimizer, tmp_path):
    """LookSAM resumes between two climbs."""

    def run(epochs, ckpt_path=None):
        module = Foreign(mlp(batch_norm=True), optimizer)
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [SharpnessAware(method, rho=0.2, **options), checkpoint]
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return module, callbacks[0]

    straight, first = run(2)
    resumed, second = run(2, tmp_path / "epoch=0.ckpt")
    assert resumed.hooks.count("before_step") == straight.hooks.count("before_step") / 2 == 6
    assert_same_bits(straight, resumed)
    for buffer, values in first.state_dict()["memory"].items():
        assert_same_bits(values, second.state_dict()["memory"][buffer])


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    def run(ckpt_path=None, **limits):
        data = digits(augmentation=Augmentation(crop=1))
        module = Classifier(small_network(), 10, sgd(), cosine(2), mixup=0.2)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
        callbacks = [SharpnessAware("fsam", rho=0.1, lmbda=0.6, perturb="weight"), checkpoint]
        trainer = quiet_trainer(
            callbacks=callbacks, enable_checkpointing=True, plugins=[AtomicCheckpointIO()], **limits
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module, trainer

    straight, trainer = run(max_epochs=2)
    assert trainer.global_step == 38
    resumed, trainer = run(tmp_path / "step=28.ckpt", max_epochs=2)
    assert trainer.global_step == 38
    assert_same_bits(straight.network, resumed.network)


def test_the_checkpoint_holds_averages_by_name_and_no_weights(tmp_path):
    callback = SharpnessAware("fsam", rho=0.2)
    trainer = fit(Foreign(mlp(batch_norm=True)), callback)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["SharpnessAware"]
    names = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"]
    assert state.keys() == {"method", "steps", "memory"}
    assert {key: list(value) for key, value in state["memory"].items()} == {"ema": names}
    assert all(value.abs().max() < 1 for value in state["memory"]["ema"].values())


# --- when something goes wrong ----------------------------------------------------------------------------------------


class Failing(Foreign):
    """Fails in the second pass of the third batch, in forward or in backward."""

    def __init__(self, error, where, net=None):
        super().__init__(net)
        self.error, self.where = error, where

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (batch_idx, self.sam_pass) == (2, 2):
            if self.where == "forward":
                raise self.error
            loss.register_hook(self.fail)
        if self.sam_pass == 1:
            self.clean = {name: value.clone() for name, value in self.net.state_dict().items()}
        return loss

    def fail(self, gradient):
        raise self.error


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("options", [{}, {"perturb": "weight"}], ids=["all", "part"])
def test_what_hits_the_second_pass_leaves_weights_and_module_as_they_were(options, error, where, tmp_path):
    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "late.ckpt")

    module, callback = Failing(error, where, mlp(batch_norm=True)), SharpnessAware("fsam", rho=0.5, **options)
    trainer = quiet_trainer(max_epochs=1, callbacks=[SaveOnException(), callback])
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(SystemExit):
            trainer.fit(module, loader())
    else:
        with pytest.raises(ValueError, match="mine"):
            trainer.fit(module, loader())
    weights = {name: value for name, value in module.clean.items() if "running" not in name and "num" not in name}
    assert_same_bits(weights, {name: module.net.state_dict()[name] for name in weights})
    saved = torch.load(tmp_path / "late.ckpt", weights_only=True)["state_dict"]
    assert_same_bits(weights, {name: saved[f"net.{name}"] for name in weights})
    assert module.net[1].num_batches_tracked == 3
    assert module.net[1].track_running_stats
    assert not {"backward", "log", "log_dict", "sam_pass"} & vars(module).keys()
    assert "training_step" not in vars(trainer.strategy)
    assert all(param.requires_grad for param in module.parameters())
    # and it goes on training
    assert fit(Foreign(mlp(batch_norm=True)), callback).global_step == 6


@pytest.mark.parametrize("method", ["fsam", "gsam"])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_parameter_without_gradient_in_one_pass(missing, method):
    """What moved comes back; what did not move has no average."""

    class Branches(Foreign):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(6, 4, dtype=torch.float64)

        def forward(self, x):
            out = self.net(x)
            return out if self.sam_pass == missing else out + self.extra(x)

        def training_step(self, batch, batch_idx):
            if self.sam_pass == 1:
                self.before.append(self.extra.weight.detach().clone())
            return super().training_step(batch, batch_idx)

    module, callback = Branches(), SharpnessAware(method, rho=0.2)
    module.before = []
    # no step at all: what is left is what restore left
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit(module, callback)
    assert all(torch.equal(weight, module.before[0]) for weight in module.before)
    if method == "fsam":
        assert ("extra.weight" in callback.state_dict()["memory"]["ema"]) == (missing == 2)
    # and with steps it trains where a gradient is
    module.optimizer = momentum
    fit(module, callback)
    assert torch.equal(module.extra.weight, module.before[0]) == (missing == 2)


def test_a_batch_that_the_first_pass_skips_is_skipped():
    class Skipping(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 else loss

    module = Skipping()
    fit(module, SharpnessAware("fsam", rho=0.2, perturb="weight"))
    assert [number for number, _ in module.seen] == [1, 2] * 2 + [1] + [1, 2] * 3
    assert all(param.requires_grad for param in module.parameters())


def test_the_guard_against_nan_speaks_first():
    class Poison(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 3 else loss

    module = Poison()
    with pytest.raises(NonFiniteError, match=r"^step 3: the loss is NaN or infinite"):
        fit(module, [SharpnessAware("fsam", rho=0.2, perturb="weight"), NonFiniteGuard()])
    assert all(param.requires_grad for param in module.parameters())
    module = Foreign()
    assert fit(module, [NonFiniteGuard(), SharpnessAware("fsam", rho=0.2)]).global_step == 6


# --- one callback, several runs ---------------------------------------------------------------------------------------


def test_a_callback_serves_several_fits_each_of_which_starts_anew():
    callback, fresh = SharpnessAware("fsam", rho=0.2), SharpnessAware("fsam", rho=0.2)
    fit(Foreign(), callback)
    again, alone = Foreign(), Foreign()
    trainer = fit(again, callback)
    fit(alone, fresh)
    assert_same_bits(again, alone)
    assert len(callback.engine.memory.buffers["ema"]) == 4
    # the same trainer once more
    trainer.fit_loop.max_epochs = 2
    trainer.fit(again, loader())
    assert trainer.global_step == 12
    assert again.seen[-1][0] == 2


def test_validation_and_test_see_the_module_as_it_is(tmp_path):
    class Evaluated(Foreign):
        def validation_step(self, batch, batch_idx):
            self.log("validated", nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.where.append(getattr(self, "sam_pass", None))

        test_step = validation_step

    module, callback = Evaluated(), SharpnessAware("fsam", rho=0.2)
    module.where = []
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    x, y = next(iter(loader(48)))
    expected = nn.functional.cross_entropy(module(x), y).item()
    for evaluate in (trainer.validate, trainer.test):
        assert evaluate(module, loader(), verbose=False)[0]["validated"] == pytest.approx(expected)
    trainer.test(module, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert set(module.where) == {1, None}
    # what a test loaded is not where the next fit starts, whatever the method
    alone = Foreign()
    fit(alone, SharpnessAware("sam", rho=0.2))
    for used in (SharpnessAware("sam", rho=0.2), fitted := SharpnessAware("sam", rho=0.2)):
        if used is fitted:
            fit(Foreign(), fitted)
        quiet_trainer(callbacks=[used]).test(module, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
        again = Foreign()
        fit(again, used)
        assert_same_bits(again, alone)


def test_averages_of_weights_are_of_clean_weights():
    class Collect(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rows.append(pl_module.net[0].weight.detach().clone())

    module, rows = Foreign(mlp(batch_norm=True)), []
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    fit(module, [SharpnessAware("fsam", rho=0.2), Collect(), average])
    expected = rows[0]
    for row in rows[1:]:
        expected = 0.5 * expected + 0.5 * row
    torch.testing.assert_close(module.net[0].weight, expected, rtol=0, atol=1e-12)
    assert not {"backward", "sam_pass"} & vars(module).keys()


def test_stochastic_weight_averaging():
    """Its last epoch renews the statistics of BatchNorm without a backward pass: one pass a batch."""
    module = Foreign(mlp(batch_norm=True))
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    trainer = fit(module, [SharpnessAware("fsam", rho=0.2), averaging], max_epochs=3)
    assert [number for number, _ in module.seen] == [1, 2] * 18 + [1] * 6
    assert trainer.global_step >= 18
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("finder_first", [True, False])
def test_a_search_for_the_learning_rate_leaves_no_trace(finder_first, tmp_path):
    class Tunable(Foreign):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
    found, callback = Tunable(), SharpnessAware("fsam", rho=0.2)
    callbacks = [finder, callback] if finder_first else [callback, finder]
    trainer = fit(found, callbacks, default_root_dir=tmp_path)
    direct = Tunable()
    direct.lr = found.lr
    fit(direct, SharpnessAware("fsam", rho=0.2))
    assert trainer.global_step == 6
    assert_same_bits(found.net, direct.net)


@pytest.mark.parametrize("how", [{"barebones": True}, {"fast_dev_run": 2}, {"detect_anomaly": True}], ids=str)
def test_other_ways_to_run(how, recwarn):
    settings: dict = {} if "fast_dev_run" in how else {"max_epochs": 1}
    module = Quiet()
    if "barebones" in how:
        trainer = Trainer(accelerator="cpu", callbacks=[SharpnessAware("fsam", rho=0.2)], **settings, **how)
    else:
        trainer = quiet_trainer(callbacks=[SharpnessAware("fsam", rho=0.2)], **settings, **how)
    trainer.fit(module, loader())
    assert module.passes == [1, 2] * trainer.global_step
    assert not [warning for warning in recwarn if "self.log" in str(warning.message)]


class Quiet(Foreign):
    """Logs nothing itself."""

    def training_step(self, batch, batch_idx):
        self.passes = [*getattr(self, "passes", []), self.sam_pass]
        return self.loss(batch)

    def on_train_epoch_end(self):
        pass


@pytest.mark.parametrize("method", ["esam", "asam"])
def test_a_classifier_of_this_package_with_augmentation_and_mixup(method):
    module = Classifier(small_network(), 10, sgd(), cosine(3), mixup=0.1)
    trainer = quiet_trainer(max_epochs=3, callbacks=[SharpnessAware(method, rho=0.05)])
    data = digits(augmentation=Augmentation(crop=1), label_noise=None)
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] > 0.5
    assert trainer.global_step == 57


# --- compilation ------------------------------------------------------------------------------------------------------


class WithNetwork(Foreign):
    """What CompileNetwork looks for."""

    @property
    def network(self):
        return self.net


@pytest.mark.parametrize("how", ["callback", "function"])
@pytest.mark.parametrize(("freeze", "graphs"), [("bn", 2), ("buffers", 1)])
def test_a_compiled_network_has_a_graph_for_each_kind_of_pass_and_none_for_steps(how, freeze, graphs):
    torch._dynamo.reset()
    counter, net = CompileCounter(), mlp(batch_norm=True)
    callbacks: list[Callback] = [SharpnessAware("fsam", rho=0.2, freeze=freeze)]
    if how == "callback":
        callbacks.append(CompileNetwork(backend=counter))
        module: LightningModule = WithNetwork(net)
    else:
        module = Foreign(torch.compile(net, backend=counter))
    fit(module, callbacks, max_epochs=3)
    assert counter.frame_count == graphs
    plain = Foreign(mlp(batch_norm=True))
    fit(plain, SharpnessAware("fsam", rho=0.2, freeze=freeze), max_epochs=3)
    for ours, theirs in zip(net.state_dict().values(), plain.net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"method": "esam", "gamma": 1.0}, {"perturb": "weight"}, {"interval": 2}])
def test_options_do_not_recompile_at_every_step(options):
    torch._dynamo.reset()
    counter = CompileCounter()
    fit(
        Foreign(torch.compile(mlp(batch_norm=True), backend=counter)),
        SharpnessAware(**{"rho": 0.2} | options),
        max_epochs=4,
    )
    assert counter.frame_count <= 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_callback_is_a_few_words_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(
        "fit --model Classifier --model.network SmallCNN --model.num_classes 10 --data DigitsDataModule"
        " --data.batch_size 64 --trainer.accelerator cpu"
        " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
        " --trainer.logger CSVLogger --trainer.logger.save_dir logs --trainer.log_every_n_steps 5"
        " --trainer.max_epochs 1 --trainer.callbacks+=SharpnessAware --trainer.callbacks.method=fsam"
        " --trainer.callbacks.rho=0.1 --trainer.callbacks.lmbda=0.6 --trainer.callbacks.memory_dtype=bfloat16"
    )
    assert main(words) == 0
    (path,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(path.open()) if row.get("sam/rho")]
    assert len(rows) == 3
    names = ["loss_perturbed", "sharpness", "grad_norm", "noise_norm", "cos_g_m", "rho"]
    assert all(float(row["sam/rho"]) == pytest.approx(0.1) for row in rows)
    assert all(row[f"sam/{name}"] for row in rows for name in names)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["SharpnessAware"]
    assert state["method"] == "fsam"
    assert all(value.dtype == torch.bfloat16 for value in state["memory"]["ema"].values())
    assert main([*words, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"]) == 0
