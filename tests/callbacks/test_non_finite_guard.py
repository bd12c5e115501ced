"""A run that goes wrong stops with step and module named, and its last good checkpoint stays."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.helpers import digits, forgetful_digits, quiet_trainer, sgd, small_network
from torchlethe.callbacks import ExportWeights, NonFiniteError, NonFiniteGuard
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.io import read_state_dict
from torchlethe.lightning_modules import Classifier, SFRon


class PoisonAt(Callback):
    """Put a NaN into one weight before a step."""

    def __init__(self, step, name):
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.get_parameter(self.name).view(-1)[0] = float("nan")


def weight_names():
    return [name for name, p in small_network().named_parameters() if p.dim() > 1]


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_the_first_bad_module_and_step_are_named_and_the_good_checkpoint_stays(kind, tmp_path):
    name = weight_names()[1]
    automatic = kind == "automatic"
    module = Classifier(small_network(), 10, sgd()) if automatic else SFRon(small_network(), 10, steps=15)
    trainer = quiet_trainer(
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[
            PoisonAt(8, f"network.{name}"),
            NonFiniteGuard(),
            ModelCheckpoint(tmp_path, "good", every_n_train_steps=3, enable_version_counter=False),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    owner = f"network.{name.rpartition('.')[0]}"
    with pytest.raises(
        NonFiniteError, match=rf"^step 8: the loss is NaN or infinite, first in the output of '{owner}'"
    ):
        trainer.fit(module, datamodule=digits() if automatic else forgetful_digits())
    saved = read_state_dict(tmp_path / "good.ckpt")
    assert torch.load(tmp_path / "good.ckpt", weights_only=True)["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in saved.values() if value.is_floating_point())


def test_a_flag_read_rarely_still_knows_the_step(tmp_path):
    """Off the CPU the flag is read every so many steps: as here, where the step is past when it is read."""
    guard = NonFiniteGuard(every_n_steps=4)
    module = Classifier(small_network(), 10)
    guard.first_bad_step = torch.tensor(17)
    module.network.get_parameter(weight_names()[0]).data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=rf"^step 17: .*the weight 'network.{weight_names()[0]}' is not finite"):
        guard.on_save_checkpoint(quiet_trainer(), module, {})


def test_a_healthy_run_is_left_alone():
    trainer = quiet_trainer(max_epochs=1, callbacks=[NonFiniteGuard(every_n_steps=1)])
    trainer.fit(Classifier(small_network(), 10, sgd()), datamodule=digits())
    assert trainer.global_step == 19


def test_wrong_interval():
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        NonFiniteGuard(0)


class Masked(nn.Module):
    """Adds a causal mask, whose -inf is meant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))
        self.scores = Scores()
        self.head = nn.Linear(64, 10)

    def forward(self, image):
        return self.head(self.scores(image[:, 0], self.mask).softmax(-1).flatten(1))


class Scores(nn.Module):
    def forward(self, image, mask):
        return image + mask


def test_what_is_infinite_by_intention_does_not_stop_a_run(tmp_path):
    module = Classifier(Masked(), 10, sgd())
    callbacks = [NonFiniteGuard(), ModelCheckpoint(tmp_path, "good", every_n_train_steps=2)]
    trainer = quiet_trainer(max_steps=4, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(module, datamodule=digits())
    assert (tmp_path / "good.ckpt").is_file()
    assert trainer.global_step == 4
    guard = NonFiniteGuard()
    guard.on_train_start(trainer, module)
    module.network.head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the weight 'network\.head\.weight' is not finite; no checkpoint"):
        guard.on_save_checkpoint(trainer, module, {})


def test_a_nan_is_blamed_on_the_module_that_makes_it_not_on_a_legal_infinity():
    trainer = quiet_trainer(max_steps=4, callbacks=[NonFiniteGuard()])
    with pytest.raises(NonFiniteError, match=r"^step 0: .* first in the output of 'network\.head'"):
        trainer.fit(Classifier(PoisonedHead(), 10, sgd()), datamodule=digits())
    trainer = quiet_trainer(max_steps=4, callbacks=[NonFiniteGuard()])
    with pytest.raises(NonFiniteError, match=r"^step 0: .* first in the output of 'network'"):
        trainer.fit(Classifier(OwnFault(), 10, sgd()), datamodule=digits())


class PoisonedHead(Masked):
    def __init__(self):
        super().__init__()
        self.head.bias.data.fill_(float("nan"))


class OwnFault(Masked):
    """The NaN arises in the forward of a module with children, behind all of these."""

    def forward(self, image):
        return torch.log(-super().forward(image).exp())


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_weights_that_the_last_step_spoiled_are_not_exported(kind, tmp_path):
    class SpoilLast(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.network.get_parameter(weight_names()[0]).data.view(-1)[0] = float("nan")

    automatic = kind == "automatic"
    module = Classifier(small_network(), 10, sgd()) if automatic else SFRon(small_network(), 10, steps=3)
    trainer = quiet_trainer(
        max_steps=3, default_root_dir=tmp_path, callbacks=[SpoilLast(), ExportWeights(), NonFiniteGuard()]
    )
    with pytest.raises(NonFiniteError, match=rf"^step 3: the weight 'network.{weight_names()[0]}' is not finite after"):
        trainer.fit(module, datamodule=digits() if automatic else forgetful_digits())
    assert not list(tmp_path.iterdir())
