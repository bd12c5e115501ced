"""SFRon's options do what they say."""

import warnings
from itertools import cycle

import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches
from tests.helpers import assert_same_bits
from torchlethe.components import SaliencyMask
from torchlethe.updates import SFRonUpdate


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 4
    return {"forget": fixed_batches(images[:8], labels[:8], 8), "remain": fixed_batches(images[8:], labels[8:], 8)}


def run(loaders, steps=6, only=None, **arguments):
    torch.manual_seed(0)
    network = Tiny().double()
    rule = SFRonUpdate(steps=steps, forget_every=3, **arguments)
    rule.configure(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule.prepare(network, loaders)
    network.train()
    forget, remain = cycle(loaders["forget"]), cycle(loaders["remain"])
    for k in range(steps if only is None else only):
        rule.step(network, {"forget": next(forget), "remain": next(remain)}, k)
    return network, rule


def test_slow_update_off_equals_beta_one(loaders):
    off, _ = run(loaders, slow_beta=1.0)
    cycle_off, _ = run(loaders, slow_beta=1.0, slow_every="cycle")
    assert_same_bits(off, cycle_off)


def test_beta_zero_keeps_the_parameters_but_not_the_statistics(loaders):
    torch.manual_seed(0)
    start = Tiny().double()
    network, _ = run(loaders, slow_beta=0.0)
    for (name, before), after in zip(start.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-15, msg=name)
    assert not torch.equal(network.bn1.running_mean, start.bn1.running_mean)


def test_the_cycle_reading_pulls_once_a_cycle(loaders):
    each, _ = run(loaders, slow_beta=0.5)
    cycle_, _ = run(loaders, slow_beta=0.5, slow_every="cycle")
    assert not torch.equal(each.fc.weight, cycle_.fc.weight)


def test_gamma_infinity_leaves_only_decay_and_strict_leaves_nothing(loaders):
    nothing = {"gamma": float("inf"), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)}
    # the repair step is switched off by a learning rate of its own
    apart = nothing | {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "forget_optimizer": nothing["optimizer"]}
    torch.manual_seed(0)
    start = Tiny().double()
    loose, _ = run(loaders, only=1, **apart)
    torch.testing.assert_close(loose.fc.weight, start.fc.weight * (1 - 0.1 * 0.1), rtol=0, atol=1e-15)
    strict, _ = run(loaders, only=1, strict_mask=True, **apart)
    assert_same_bits(dict(strict.named_parameters()), dict(start.named_parameters()))


def test_dual_optimizers_keep_their_momentum_apart(loaders):
    network, rule = run(
        loaders,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        forget_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    remain, forget = rule.optimizers
    assert "momentum_buffer" in remain.state[network.fc.weight]
    assert float(forget.state[network.fc.weight]["step"]) == 2


def test_a_mask_function_and_no_mask(loaders):
    _, ratio = run(loaders)
    _, custom = run(loaders, mask=lambda forget, remain: SaliencyMask.from_ratio(forget, remain, 1.0))
    _, none = run(loaders, mask="none")
    assert_same_bits(ratio.mask.masks, custom.mask.masks)
    assert none.mask is None


def test_a_top_mask_keeps_its_share_and_a_stride_skips_remaining_batches(loaders):
    _, top = run(loaders, mask="top", mask_fraction=0.25)
    assert top.mask.kept_fraction() == pytest.approx(0.25, abs=0.01)
    _, strided = run(loaders, fisher_stride=2)
    _, every_second = run(loaders | {"remain": loaders["remain"][::2]})
    assert_same_bits(strided.mask.masks, every_second.mask.masks)


def test_a_step_before_the_preparation_is_refused(loaders):
    rule = SFRonUpdate()
    with pytest.raises(RuntimeError, match=r"came before configure\(network\) and prepare"):
        rule.step(Tiny().double(), {"remain": loaders["remain"][0], "forget": loaders["forget"][0]}, 0)


def test_bn_eval_keeps_forget_batches_out_of_the_statistics(loaders):
    torch.manual_seed(0)
    network, rule = Tiny().double(), SFRonUpdate(bn_forget="eval", mask="none")
    rule.configure(network)
    network.train()
    before = network.bn1.running_mean.clone()
    rule._forget(network, loaders["forget"][0], 0, torch.Tensor.backward)
    assert torch.equal(network.bn1.running_mean, before)
    assert network.bn1.training


def test_the_state_survives_a_round_trip(loaders):
    _, rule = run(loaders, slow_beta=0.5, only=4)
    other = SFRonUpdate(steps=6, forget_every=3, slow_beta=0.5)
    other.configure(Tiny().double())
    other.load_state_dict(rule.state_dict())
    assert other.prepared
    assert_same_bits(other.mask.masks, rule.mask.masks)
    assert all(torch.equal(a, b) for a, b in zip(other.slow.previous, rule.slow.previous, strict=True))


def test_little_effect_is_said(loaders):
    torch.manual_seed(0)
    network, rule = Tiny().double(), SFRonUpdate(gamma=1e9)
    rule.configure(network)
    with pytest.warns(UserWarning, match=r"keeps 0\.0% of the weights; a smaller gamma"):
        rule.prepare(network, loaders)
    network, rule = run(loaders, alpha=1e-6)
    with pytest.warns(UserWarning, match="no forgetting step reached the clipping norm"):
        rule.finish(network)


@pytest.mark.parametrize(("alpha", "moved"), [(1e-6, False), (25.0, True)])
def test_a_loss_that_did_not_move_is_said(loaders, alpha, moved):
    # the repair steps do not move anything, so that only the forgetting steps do
    apart = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
        "forget_optimizer": lambda p: torch.optim.SGD(p, lr=0.05),
    }
    network, rule = run(loaders, steps=24, alpha=alpha, **apart)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rule.finish(network)
    said = [str(warning.message) for warning in caught]
    assert any("did not move" in sentence and f"raise alpha (now {alpha:g})" in sentence for sentence in said) != moved
    assert len(rule.state_dict()["forget_losses"]) == 8


def test_a_mask_that_keeps_nearly_all_is_said(loaders):
    network, rule = Tiny().double(), SFRonUpdate(gamma=0.0)
    rule.configure(network)
    with pytest.warns(UserWarning, match=r"keeps 100\.0% of the weights; a larger gamma protects more"):
        rule.prepare(network, loaders)
    assert all(bool(mask.all()) for mask in rule.mask.masks.values())


def test_no_copy_is_made_when_the_slow_update_is_off(loaders):
    _, off = run(loaders, slow_beta=1.0)
    _, on = run(loaders, slow_beta=0.5)
    assert off.slow.previous == []
    assert off.state_dict()["slow"] == {"previous": []}
    assert len(on.slow.previous) == len(on.parameters)


def test_one_cycle_on_a_quadratic_filters_the_forgetting_step_by_curvature():
    """Eq. (5): displacement -b (1 - ηH)^T u, with g = 0 at the start."""
    torch.manual_seed(0)
    curvature = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    rate, repairs = 0.05, 4

    class Point(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def repair(network, batch, backward):
        optimizer = rule.optimizers[0]
        optimizer.zero_grad()
        backward((curvature * network.theta.square()).sum() / 2)
        optimizer.step()
        return {}

    push = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def forget(network, batch, strength, backward):
        rule.optimizers[-1].zero_grad()
        backward((push * network.theta).sum())
        rule.optimizers[-1].step()
        return {"forget_loss": torch.zeros(())}

    plain = {"optimizer": lambda p: torch.optim.SGD(p, lr=rate), "lr_schedule": "constant", "mask": "none"}
    rule = SFRonUpdate(steps=repairs, forget_every=repairs, **plain)
    rule._forget, rule._repair = forget, repair
    network = Point()
    rule.configure(network)
    rule.prepare(network, {})
    for k in range(repairs):
        rule.step(network, {"forget": None, "remain": None}, k)
    expected = -rate * (1 - rate * curvature) ** repairs * push
    torch.testing.assert_close(network.theta.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps is 0, it must be at least 1"),
        ({"forget_every": 0}, "forget_every is 0"),
        ({"alpha": -1.0}, "alpha is -1.0, it must be above 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"lam": 2.0}, "lam is 2.0"),
        ({"slow_beta": 2.0}, "beta is 2.0"),
        ({"mask_fraction": 1.5}, "mask_fraction is 1.5"),
        ({"fisher_stride": 0}, "fisher_stride is 0"),
        ({"cosine_every": -1}, "cosine_every is -1"),
        ({"schedule": "step"}, "schedule is 'step', allowed are cosine"),
        ({"mask": "hard"}, "mask is 'hard', allowed are ratio, top, none"),
        ({"fisher": "full"}, "mode is 'full', allowed are batch and sample"),
        ({"lr_schedule": "warm"}, "lr_schedule is 'warm', allowed are cosine and constant"),
        ({"coefficients": "x"}, "coefficients is 'x'"),
        ({"slow_every": "x"}, "slow_every is 'x'"),
        ({"bn_forget": "x"}, "bn_forget is 'x'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SFRonUpdate(**arguments)
