"""The experiment that F-SAM starts from."""

import pytest
import torch
from torch import nn

from tests.helpers import digits, quiet_trainer
from torchlethe.callbacks import AscentDirection, SharpnessAware
from torchlethe.cli import main
from torchlethe.lightning_modules import Classifier
from torchlethe.models import MLP


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Spy(AscentDirection):
    """Keeps the perturbation of each step."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        climb, self.found = self.engine.climb, []

        def watched(params, *args, **kwargs):
            before = torch.cat([p.detach().flatten() for p in params])
            climb(params, *args, **kwargs)
            self.found.append(torch.cat([p.detach().flatten() for p in params]) - before)

        self.engine.climb = watched


def fitted(callback, steps=3):
    torch.manual_seed(0)
    module = Classifier(MLP(), 10, sgd)
    trainer = quiet_trainer(max_steps=steps, callbacks=[callback])
    trainer.fit(module, datamodule=digits(batch_size=64))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_batch_direction_is_sam():
    assert torch.equal(fitted(AscentDirection("batch", rho=0.1)), fitted(SharpnessAware("sam", rho=0.1)))


def test_full_climbs_along_the_full_gradient_and_noise_at_a_right_angle_to_it():
    found = {}
    for direction in ("full", "noise"):
        callback = Spy(direction, rho=0.1)
        fitted(callback, steps=1)
        found[direction] = callback.found[0]
        torch.testing.assert_close(found[direction].norm(), torch.tensor(0.1), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    module, data = Classifier(MLP(), 10, sgd), digits()
    data.setup("fit")
    samples = data.train_set[range(len(data.train_set))]
    loss = nn.functional.cross_entropy(module(samples["image"].float() / 255), samples["label"])
    full = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(found["full"], 0.1 * full / full.norm(), rtol=1e-3, atol=1e-6)
    assert abs(float(found["noise"] @ full) / float(full.norm() * 0.1)) < 1e-3


def test_refresh_keeps_the_full_gradient_for_some_steps():
    callback = Spy("full", rho=0.1, refresh=2)
    fitted(callback, steps=3)
    first, second, third = callback.found
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert not torch.allclose(second, third, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"direction": "up"}, "direction is 'up'"), ({"refresh": 0}, "refresh is 0"), ({"rho": -1.0}, "rho is -1.0")],
)
def test_wrong_arguments_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        AscentDirection(**options)


def test_the_command_runs_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "fit --model Classifier --model.network torchlethe.models.MLP --model.num_classes 10 --data DigitsDataModule"
    options = "--trainer.fast_dev_run 2 --trainer.callbacks+=AscentDirection --trainer.callbacks.direction=noise"
    assert main([*line.split(), *options.split(), "--trainer.callbacks.rho=0.1", "--trainer.accelerator=cpu"]) == 0
