"""SEP, SEP-FA and SEP-FA-VR agree with the official code on every array of the golden file that belongs to them."""

import numpy as np
import pytest
import torch

from tests.golden_networks import TinyColour, stacked_states
from torchlethe.functional.self_ensemble import equidistant, opposite_classes, svre_direction
from torchlethe.updates.protection import SelfEnsembleProtector

VARIANTS = {"sep": "sep", "fa": "sep_fa", "favr": "sep_fa_vr"}


class Drawn(SelfEnsembleProtector):
    """Draws what the official run drew."""

    drawn: np.ndarray

    def draws(self, t):
        return self.drawn[t].tolist()


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "sep.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def data(golden):
    return torch.from_numpy(golden["x_u8"]), torch.from_numpy(golden["y"]).long()


def prepared(golden, data, variant, dtype=torch.float64, **settings):
    count, radius, step, steps, inner, batch, _ = golden["hp"].tolist()
    states = [stacked_states(golden)[i] for i in golden["used"]]
    network = TinyColour().double() if dtype is torch.float64 else TinyColour()
    rule = Drawn(network, 10, states, VARIANTS[variant], radius, step, steps, count, inner_steps=inner, **settings)
    rule.drawn = golden["favr/idx"]
    images, labels = data
    index = torch.arange(len(images))
    parts = zip(images.split(batch), labels.split(batch), index.split(batch), strict=True)
    rule.prepare([dict(zip(("image", "label", "index"), part, strict=True)) for part in parts], device="cpu")
    return rule


def perturbed(golden, data):
    batch, tb = golden["hp"].tolist()[5:]
    rows = slice(tb * batch, (tb + 1) * batch)
    return data[0][rows], data[1][rows]


def test_checkpoints_are_chosen_as_officially_where_their_number_divides_the_runs(golden):
    for (length, count), indices in zip(golden["sel_pairs"].tolist(), golden["sel_idx"], strict=True):
        if length % count == 0:
            assert equidistant(length, count) == [i for i in indices.tolist() if i >= 0]
    assert any(length % count == 0 for length, count in golden["sel_pairs"].tolist())


def test_target_classes(golden, data):
    _, labels = perturbed(golden, data)
    assert opposite_classes(10)[labels].tolist() == golden["target"].tolist()


@pytest.mark.parametrize("variant", ["sep", "fa", "favr"])
@pytest.mark.parametrize("setting", ["double", "single", "unfolded", "vectorised", "resident"])
def test_every_step_gives_the_official_bytes(variant, setting, golden, data):
    options = {"unfolded": {"fold": False}, "vectorised": {"vectorised": True}, "resident": {"resident": True}}
    dtype = torch.float32 if setting == "single" else torch.float64
    rule = prepared(golden, data, variant, dtype, **options.get(setting, {}))
    images, labels = perturbed(golden, data)
    steps = list(rule.iterate(images, labels))
    found = torch.stack([step.image for step in steps])
    np.testing.assert_array_equal(found.numpy(), golden[f"{variant}/steps_u8"])
    matches = [float(step.matches.double().mean()) for step in steps]
    np.testing.assert_allclose(matches, golden[f"{variant}/match"], atol=1e-12)
    assert bool(rule.network_ensemble.pairs) == (setting != "unfolded")
    if variant == "sep":
        np.testing.assert_allclose(found[-1].numpy() / 255, golden["sep/x_final"], atol=1e-12)


@pytest.mark.parametrize("variant", ["sep", "fa"])
def test_mean_gradient_of_the_clean_images(variant, golden, data):
    rule = prepared(golden, data, variant)
    images, labels = perturbed(golden, data)
    gradients = rule.gradients(images.to(torch.int16), rule.target[labels])[0]
    # the official losses are means over the batch, too
    np.testing.assert_allclose(gradients.mean(0).numpy() / len(images), golden[f"{variant}/grad0"], atol=1e-10)


def test_class_means(golden, data):
    rule = prepared(golden, data, "fa")
    np.testing.assert_allclose(rule.means.numpy(), golden["fa/class_means"], atol=1e-10)


def test_inner_loop_of_variance_reduction(golden, data):
    rule = prepared(golden, data, "favr")
    images, labels = perturbed(golden, data)
    clean, target = images.to(torch.int16), rule.target[labels]
    total = rule._direction(clean, clean, target, 0)[0]
    np.testing.assert_allclose(total.numpy() / len(images), golden["favr/grad_sum0"], atol=1e-10)
    inner = clean
    seen = []

    def move(image, g):
        from torchlethe.functional.self_ensemble import pixel_step

        seen.append(pixel_step(image, clean, g, rule.step, rule.radius))
        return seen[-1]

    # one draw more, so that the loop moves after the M-th as well
    drawn = [*golden["favr/idx"][0].tolist(), 0]
    svre_direction(inner, rule.gradients(clean, target)[0], drawn, lambda k, x: rule.gradient(k, x, target)[0], move)
    np.testing.assert_array_equal(seen[-1].numpy(), golden["favr/inner0_u8"])


@pytest.mark.parametrize("variant", ["fa", "favr"])
def test_compat_official_repeats_the_mistakes(variant, golden, data):
    rule = prepared(golden, data, variant, compat="official")
    images, labels = perturbed(golden, data)
    found = rule.protect(images, labels, torch.arange(len(images)))
    np.testing.assert_array_equal(found.numpy(), golden[f"{variant}_asis/final_u8"])
    np.testing.assert_allclose(rule.means[0].numpy(), golden["fa_asis/class_means0"], atol=1e-10)
    fixed = golden[f"{variant}/steps_u8"][-1]
    assert (found.numpy() != fixed).mean() > 0.05
    again = prepared(golden, data, variant, compat="official")
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.protect(images, labels, torch.arange(len(images))), found)
