"""What cannot work is one sentence, before training where it can be known then."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.sharpness_runs import SGD, Foreign, data, fit, loader, mlp
from tests.helpers import assert_same_bits, quiet_trainer
from torchlethe import optimizers
from torchlethe.callbacks import AscentDirection, SharpnessAware
from torchlethe.components import NonFiniteGradientError


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "adam"}, r"method is 'adam', allowed are fsam, sam, asam, vasso, gsam, wsam, looksam and esam"),
        ({"rho": 0}, r"rho is 0, it must be a positive number \(for no perturbation use the base optimizer\)"),
        ({"rho": -0.1}, r"rho is -0\.1, it must be a positive number .*"),
        ({"rho": float("nan")}, r"rho is nan, it must be a positive number .*"),
        ({"method": "sam", "sigma": 1.0}, r"sigma is no option of method='sam': it has no options of its own"),
        ({"method": "fsam", "alpha": 0.4}, r"alpha is no option of method='fsam': its options are sigma, lmbda, .*"),
        ({"lmbda": 1.5}, r"lmbda is 1\.5, it must lie in \[0, 1\]"),
        ({"interval": 0}, r"interval is 0, it must be at least 1"),
        ({"warmup_steps": -1}, r"warmup_steps is -1, it must be at least 0"),
        ({"rho_schedule": "cosine"}, r"rho_schedule is 'cosine', allowed are constant, linear and lr"),
        ({"scope": "rank"}, r"scope is 'rank', allowed are global and local"),
        ({"freeze": "all"}, r"freeze is 'all', allowed are bn, buffers and none"),
        ({"norm": "max"}, r"norm is 'max', allowed are global and layerwise"),
        ({"adaptive": "w"}, r"adaptive is 'w', allowed are None, w2 and eta"),
        ({"ascent_fraction": 0}, r"ascent_fraction is 0, it must lie in \(0, 1\]"),
        ({"memory_dtype": "int8"}, r"memory_dtype is 'int8', it must name a floating-point dtype such as 'bfloat16'"),
        ({"perturb": "*.weight"}, r"perturb is '\*\.weight', which is no regular expression: .*"),
        (
            {"method": "gsam", "ascent_fraction": 0.5},
            r"ascent_fraction is 0\.5, but method='gsam' needs both gradients of one batch",
        ),
        (
            {"sample_losses": lambda module, batch: batch},
            r"sample_losses is only used by method='esam' with gamma below 1, the method is 'fsam'",
        ),
    ],
)
def test_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=rf"^{sentence}\.$"):
        SharpnessAware(**arguments)


class Untouched(Foreign):
    """Fails the test when it gets as far as a step."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("a training step ran")


def refused(sentence, module=None, callbacks=None, error=ValueError, **trainer):
    module = Untouched() if module is None else module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=rf"^{sentence}\.$"):
        fit(module, callbacks or SharpnessAware("fsam", rho=0.2), **trainer)
    assert_same_bits(before, module)
    assert not {"backward", "log", "sam_pass"} & vars(module).keys()
    assert all(param.requires_grad for param in module.parameters())


def with_optimizer(make):
    return Untouched(optimizer=make)


def test_manual_optimization():
    module = Untouched()
    module.automatic_optimization = False
    refused(r"Untouched optimizes manually, .*: call torchlethe\.optimizers\.sam_step in its training_step", module)


def test_optimizers():
    def two(parameters):
        first, *rest = parameters
        return [torch.optim.SGD([first], **SGD), torch.optim.SGD(rest, **SGD)]

    # Lightning itself refuses two optimizers, also in a sentence
    refused(
        r"Training with multiple optimizers is only supported with manual optimization.*",
        with_optimizer(two),
        error=RuntimeError,
    )
    refused(
        r"the optimizer is a LBFGS, which runs passes of its own: give a plain one",
        with_optimizer(lambda parameters: torch.optim.LBFGS(parameters)),
    )
    refused(
        r"the optimizer is a FriendlySAM, which runs passes of its own: give a plain one",
        with_optimizer(lambda parameters: optimizers.FriendlySAM(parameters, **SGD)),
    )
    refused(
        r"Untouched has no optimizer, but SharpnessAware .*: return one from configure_optimizers",
        with_optimizer(lambda parameters: None),
    )
    refused(
        r"rho of a parameter group is -1, it must be above 0",
        with_optimizer(lambda parameters: torch.optim.SGD([{"params": list(parameters), "rho": -1}], lr=0.1)),
    )


def test_two_callbacks():
    refused(
        r"the Trainer has two SharpnessAware callbacks, one is allowed",
        callbacks=[SharpnessAware("sam"), AscentDirection("noise")],
    )
    # with one key for their states Lightning is faster
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SharpnessAware`"):
        quiet_trainer(callbacks=[SharpnessAware("sam"), SharpnessAware("fsam")])


def test_nothing_to_perturb():
    refused(
        r"perturb is 'head', which no trainable parameter of Untouched fits; allowed are 'all', 'norm_only' and .*",
        callbacks=SharpnessAware(perturb="head"),
    )
    refused(r"perturb is 'norm_only', which no trainable .*", callbacks=SharpnessAware(perturb="norm_only"))

    class Unused(Foreign):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    refused(
        r"none of the parameters to perturb has a gradient: the loss of Unused does not depend on those that .*",
        Unused(),
        SharpnessAware(perturb="spare"),
    )


def test_precision_and_strategy():
    refused(
        r"precision is bf16-true, in which a climb of radius rho is rounded away: use bf16-mixed, 16-mixed or 32",
        precision="bf16-true",
    )
    trainer = quiet_trainer(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    sentence = r"^the strategy is ModelParallelStrategy, SharpnessAware runs on one device or with ddp\.$"
    with pytest.raises(ValueError, match=sentence):
        SharpnessAware().setup(trainer, Foreign(), "fit")


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (SharpnessAware("sam", scope="local"), r"scope='local'"),
        (SharpnessAware("fsam", perturb="weight"), r"perturb='weight'"),
        (SharpnessAware("esam", beta=0.5), r"beta=0\.5"),
    ],
    ids=["local", "part", "drawn"],
)
def test_options_of_ddp_under_which_ranks_would_part_ways(callback, reason, option):
    """Without the sentence they wait for each other, or die of an assertion inside DDP."""
    trainer = quiet_trainer(strategy=DDPStrategy(process_group_backend="gloo", **{option: True}))
    sentence = (
        rf"^the strategy has {option}=True, .* under {reason}: train without {option}, or with scope='global'.*\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        callback.setup(trainer, Foreign(), "fit")
    SharpnessAware("gsam", perturb="weight")._refuse(trainer, Foreign())  # computes every gradient in both passes


def test_steps_without_a_batch():
    class Iterating(Untouched):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refused(r"the training_step of Iterating takes a dataloader_iter, but two passes need one batch: .*", Iterating())


def test_esam_needs_losses_of_samples():
    class NoForward(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            raise AssertionError

        configure_optimizers = Foreign.configure_optimizers
        optimizer = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    refused(
        r"NoForward has no forward that gives the losses of samples, as method='esam' needs them: .*",
        NoForward(),
        SharpnessAware("esam"),
    )


def test_a_linear_schedule_needs_an_end():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*data(), strict=True)

    refused(
        r"rho_schedule is 'linear', which needs a run of a known number of steps \(max_steps\)",
        callbacks=SharpnessAware(rho_schedule="linear"),
        batches=DataLoader(Stream(), 8),
    )


def test_sparse_gradients():
    class Words(Untouched):
        def __init__(self):
            super().__init__(nn.Embedding(10, 4, sparse=True, dtype=torch.float64))
            self.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)

    refused(r"the parameter 'net\.weight' has a sparse gradient: use sparse=False", Words())

    class Functional(Foreign):
        def __init__(self):
            super().__init__()
            self.words = nn.Parameter(torch.ones(10, 4, dtype=torch.float64))
            self.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)

        def training_step(self, batch, batch_idx):
            return nn.functional.embedding(batch[1], self.words, sparse=True).square().mean()

    refused(r"the parameter 'words' has a sparse gradient: use sparse=False", Functional())


@pytest.mark.parametrize("method", ["fsam", "gsam", "looksam"])
def test_nan_in_the_first_pass(method):
    class Poison(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.weights = {name: value.clone() for name, value in self.net.state_dict().items()}
            return loss * float("nan") if batch_idx == 3 else loss

    module, callback = Poison(), SharpnessAware(method, rho=0.2, interval=1)
    with pytest.raises(NonFiniteGradientError, match=r"^the gradient of the first pass is NaN or infinite, so .*\.$"):
        fit(module, callback)
    assert_same_bits(module.weights, module.net)
    for values in callback.engine.buffers().values():
        assert all(torch.isfinite(value).all() for value in values.values())


def test_a_batch_that_only_the_second_pass_skips():
    class Fickle(Foreign):
        def training_step(self, batch, batch_idx):
            return None if self.sam_pass == 2 else super().training_step(batch, batch_idx)

    refused(
        r"the training_step of Fickle returned a loss in the first pass and None in the second: it must skip a "
        r"batch in both or in none \(module\.sam_pass says which pass it is\)",
        Fickle(),
    )


@pytest.mark.parametrize(("of", "to"), [("fsam", "sam"), ("sam", "fsam"), ("fsam", "vasso"), ("looksam", "gsam")])
def test_resuming_with_another_method(of, to, tmp_path):
    fit(Foreign(), SharpnessAware(of)).save_checkpoint(tmp_path / "run.ckpt")
    sentence = (
        rf"^the checkpoint is of method='{of}', but the callback's method is '{to}': resume with the method .*\.$"
    )
    trainer = quiet_trainer(max_epochs=2, callbacks=[SharpnessAware(to)])
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(Untouched(), loader(), ckpt_path=tmp_path / "run.ckpt")


def test_a_plain_run_may_go_on_with_the_callback(tmp_path):
    fit(Foreign(), None).save_checkpoint(tmp_path / "run.ckpt")
    trainer = quiet_trainer(max_epochs=2, callbacks=[SharpnessAware("fsam")])
    trainer.fit(Foreign(), loader(), ckpt_path=tmp_path / "run.ckpt")
    assert trainer.global_step == 12
