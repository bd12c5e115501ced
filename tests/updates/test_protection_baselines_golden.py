"""EM, emax, AR and OPS agree with the arrays that the published procedures gave."""

import numpy as np
import pytest
import torch

from tests.golden_networks import TinyColour, stacked_states
from torchlethe.functional.autoregressive import autoregressive_pattern, l2_scaled
from torchlethe.functional.sign_descent import sign_descent
from torchlethe.updates.protection import AutoregressiveProtector, OnePixelShortcutProtector
from torchlethe.updates.protection.frozen import frozen
from torchlethe.updates.protection.joint_noise import input_gradient


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "sep.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def last_checkpoint(golden):
    network = TinyColour().double()
    network.load_state_dict(stacked_states({name: value.numpy() for name, value in golden.items()})[6])
    return network


@pytest.mark.parametrize(("name", "step"), [("em", 0.8), ("emax", -0.8)])
def test_steps_of_error_minimising_and_maximising_noise(golden, name, step):
    image, label = golden["x_u8"][:6].double(), golden["y"][:6]
    network = last_checkpoint(golden)
    with frozen(network):
        delta = sign_descent(
            lambda now, t: input_gradient(network, now, label), image, 255 * golden["em/noise0"], 8, step, 4
        )
    torch.testing.assert_close(delta / 255, golden[f"{name}/delta"], rtol=0, atol=1e-12)
    assert not network.training or all(p.requires_grad for p in network.parameters())


def test_autoregressive_pattern(golden):
    label, start = torch.tensor([0, 1, 0]), golden["ar/start"].expand(3, -1, -1, -1)
    kernels = torch.stack([golden["ar/coef"], golden["ar/coef"] * 0.5])
    delta, norms = l2_scaled(autoregressive_pattern(kernels, label, start), 1.0, crop=4)
    torch.testing.assert_close(delta[0], golden["ar/delta"], rtol=0, atol=1e-12)
    assert torch.equal(delta[0], delta[2])
    assert not torch.allclose(delta[0], delta[1])
    assert norms.shape == (3,)


def test_only_the_start_that_matters_is_drawn(golden):
    protector = AutoregressiveProtector(2)
    protector.kernels, protector.size = golden["ar/coef"][None].expand(2, -1, -1, -1), [3, 8, 8]
    found = protector.perturbation(torch.tensor([0, 1]), torch.tensor([3, 3]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2, dtype=torch.float64))
    # the recursion holds between the pixels of the result
    b, s = golden["ar/coef"], found[0]
    windows = s.unfold(1, 3, 1).unfold(2, 3, 1)
    expected = (b[:, None, None] * windows).sum((-1, -2))
    torch.testing.assert_close(expected, s[:, 2:, 2:], rtol=1e-9, atol=1e-12)


def test_one_pixel_search(golden):
    protector = OnePixelShortcutProtector(10)
    batches = [
        {"image": image, "label": label, "index": torch.arange(len(label))}
        for image, label in zip(golden["x_u8"].split(7), golden["y"].split(7), strict=True)
    ]
    protector.prepare(batches, device="cpu")
    assert torch.equal(protector.position, golden["ops/pos_row_col"])
    assert torch.equal(protector.colour.double(), golden["ops/value"].double())
