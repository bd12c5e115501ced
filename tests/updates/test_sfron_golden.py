"""SFRon agrees with the official code on every array of the golden file."""

from itertools import cycle

import numpy as np
import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches, tensors_under
from torchlethe.components import AdaptiveForgetLoss, SaliencyMask
from torchlethe.functional.forgetting import adaptive_forget_loss, forget_coefficients
from torchlethe.updates import SFRonUpdate

SGD = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4)}
CASE_A = SGD | {"steps": 12, "forget_every": 3, "alpha": 25.0, "clip": 1.0, "loss_floor": 0.0}
CASES = {
    "a": (CASE_A, 1e-12),
    "b": (CASE_A | {"slow_beta": 0.7}, 1e-12),
    "c": (
        {
            "optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.05),
            "steps": 8,
            "forget_every": 1,
            "alpha": 500.0,
            "clip": 7.0,
            "lam": 0.6,
            "loss_floor": 0.0,
        },
        1e-9,
    ),
    "d": (
        CASE_A | {"coefficients": "uniform", "mask": "none", "schedule": "linear", "alpha": 2.0, "clip": 1e9},
        1e-12,
    ),
}


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "sfron_cls.npz") as file:
        return dict(file)


@pytest.fixture
def network(golden):
    network = Tiny().double()
    state = tensors_under(golden, "init.")
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    return network


@pytest.fixture(scope="module")
def loaders(golden):
    x = {name: torch.from_numpy(golden[name]) for name in ("x_forget", "y_forget", "x_retain", "y_retain")}
    return {
        "forget": fixed_batches(x["x_forget"], x["y_forget"], int(golden["batch_forget"])),
        "remain": fixed_batches(x["x_retain"], x["y_retain"], int(golden["batch_retain"])),
    }


def test_coefficients_weights_and_loss_are_the_official_ones(golden):
    losses = torch.from_numpy(golden["coef_per_sample_loss"])
    lam = float(golden["coef_lambda"])
    coefficients = forget_coefficients(losses, lam)
    expected = torch.from_numpy(golden["coef_weights"])
    torch.testing.assert_close(coefficients / coefficients.sum(), expected, rtol=0, atol=1e-15)
    value = float(golden["coef_loss_value"])
    assert float(adaptive_forget_loss(losses, lam)) == pytest.approx(value, abs=1e-15)


def test_a_loss_of_exactly_zero_takes_the_whole_weight_unless_there_is_a_floor(golden):
    losses = torch.from_numpy(golden["zero_case_loss_f32"])
    expected = torch.from_numpy(golden["zero_case_weights_f32"])
    official = AdaptiveForgetLoss(lam=0.5, floor=0.0).weights(losses)
    torch.testing.assert_close(official, expected / expected.sum(), rtol=1e-6, atol=1e-7)
    assert AdaptiveForgetLoss(lam=0.5, floor=1e-4).weights(losses).max() < 0.5


def test_fisher_and_mask_are_exact(golden, network, loaders):
    seen = {}

    def recorded_ratio(forget, remain):
        seen.update(fisher_forget=forget, fisher_remain=remain)
        return SaliencyMask.from_ratio(forget, remain, gamma=1.0)

    rule = SFRonUpdate(**CASE_A, mask=recorded_ratio)
    rule.configure(network)
    rule.prepare(network, loaders)
    for name, fisher in seen.items():
        for key, value in tensors_under(golden, f"{name}.").items():
            torch.testing.assert_close(fisher[key], value, rtol=1e-12, atol=0)
    for key, value in tensors_under(golden, "mask.").items():
        assert torch.equal(rule.mask.masks[key], value.double()), key


@pytest.mark.filterwarnings("ignore:the saliency mask")
@pytest.mark.parametrize("case", CASES)
def test_every_step_ends_in_the_official_state(golden, network, loaders, case):
    arguments, tolerance = CASES[case]
    rule = SFRonUpdate(**arguments)
    rule.configure(network)
    rule.prepare(network, loaders)
    network.train()
    forget, remain = cycle(loaders["forget"]), cycle(loaders["remain"])
    norms, rates, checked = [], [], 0
    for k in range(rule.steps):
        batch = {"remain": next(remain)}
        if k % rule.forget_every == 0:
            batch["forget"] = next(forget)
        logs = rule.step(network, batch, k)
        norms += [float(logs["forget_gradient_norm"])] if "forget_gradient_norm" in logs else []
        rates.append(rule.optimizers[0].param_groups[0]["lr"])
        state = network.state_dict()
        for key, value in tensors_under(golden, f"{case}.step{k + 1}.").items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
            checked += 1
    assert checked > 10
    np.testing.assert_allclose(norms, golden[f"{case}.forget_grad_norm_preclip"], rtol=1e-8)
    np.testing.assert_allclose(rates, golden[f"{case}.lr_used"], rtol=1e-12)
    if case == "a":
        buffers = rule.optimizers[0].state
        for key, value in tensors_under(golden, "a.momentum_final.").items():
            parameter = network.get_parameter(key)
            torch.testing.assert_close(buffers[parameter]["momentum_buffer"], value, rtol=0, atol=tolerance)
