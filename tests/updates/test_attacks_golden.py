"""The arrays of the official FG-UAP class and of its peers' functions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import fixed_batches, tensors_under
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import layer_saturation_loss, margin_loss, truncated_ratio_loss
from torchlethe.metrics import DominanceRatio, FoolingRatio
from torchlethe.models import Normalize, NormalizedClassifier
from torchlethe.updates.attacks import (
    FeatureGathering,
    LayerSaturation,
    SignGradient,
    TruncatedRatio,
    clean_outputs,
    craft,
)


class TinyRGB(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, image):
        hidden = torch.relu(self.bn1(self.conv1(image)))
        return self.fc(torch.relu(self.bn2(self.conv2(hidden))).mean((2, 3)))


@pytest.fixture(scope="module")
def golden(golden_dir):
    return dict(np.load(golden_dir / "fg_uap.npz"))


def build(golden):
    network = TinyRGB().double()
    network.load_state_dict(tensors_under(golden, "model/"), strict=False)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).double()
    normalize.mean.copy_(torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(-1, 1, 1))
    normalize.std.copy_(torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(-1, 1, 1))
    return NormalizedClassifier(network, normalize).eval().requires_grad_(False)


def data(golden, images, labels, size=12):
    return fixed_batches(torch.from_numpy(golden[images]).double() / 255, torch.from_numpy(golden[labels]), size)


def noise(golden, case="untargeted"):
    p, xi = (2.0, golden["hp"][1]) if case == "l2" else (math.inf, golden["hp"][0])
    start = UniversalNoise((3, 8, 8), float(xi), p, clamp=False, dtype=torch.float64)
    with torch.no_grad():
        start.v.copy_(torch.from_numpy(golden["v0"]))
    return start


def attack(golden, case):
    return FeatureGathering(int(golden["hp"][5]) if case == "targeted" else None, lam=float(golden["hp"][4]))


@pytest.mark.parametrize("case", ["untargeted", "targeted", "l2"])
def test_gradient_and_first_step(golden, case):
    network, v = SplitNetwork(build(golden), "network.fc"), noise(golden, case)
    batch = data(golden, "x_u8", "y")[0]
    loss, logs = attack(golden, case).loss(network, v, batch | clean_outputs(network, batch["image"]), 0)
    (gradient,) = torch.autograd.grad(loss, v.v)
    assert abs(float(logs["cosine"]) - float(golden["loss_v0_batch0"])) < 1e-12
    torch.testing.assert_close(gradient, torch.from_numpy(golden[f"{case}/grad0"]), rtol=0, atol=1e-12)
    craft(attack(golden, case), network, v, [batch])
    torch.testing.assert_close(v.v.detach(), torch.from_numpy(golden[f"{case}/v_step1"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["untargeted", "targeted", "l2"])
def test_every_epoch_and_its_evaluation(golden, case):
    network, v = SplitNetwork(build(golden), "network.fc"), noise(golden, case)
    epochs, ratios = [], []
    validation = data(golden, "xval_u8", "yval")
    histogram = DominanceRatio(10, ks=(1, 3))
    bounded = []

    def evaluate(epoch):
        fooling = FoolingRatio()
        histogram.reset()
        for batch in validation:
            with torch.no_grad():
                found, clean = (network(x).logits.argmax(1) for x in (v(batch["image"]), batch["image"]))
            fooling.update(found, clean)
            histogram.update(found)
        epochs.append(v.v.detach().clone())
        ratios.append(float(fooling.compute()) * 100)
        v.keep_if_better_(ratios[-1])
        bounded.append(float(torch.linalg.vector_norm(v.v.detach(), v.p)) <= v.xi)

    craft(attack(golden, case), network, v, data(golden, "x_u8", "y"), int(golden["hp"][6]), evaluate)
    torch.testing.assert_close(torch.cat(epochs), torch.from_numpy(golden[f"{case}/v_epochs"]), rtol=0, atol=1e-10)
    np.testing.assert_allclose(ratios, golden[f"{case}/fr_epochs_2dp"], atol=0.0051)
    assert float(v.best_score) == pytest.approx(float(golden[f"{case}/best_fr"]))
    torch.testing.assert_close(v.chosen, torch.from_numpy(golden[f"{case}/v_best"]), rtol=0, atol=1e-10)
    assert histogram.histogram.tolist() == golden[f"{case}/adv_hist"].tolist()
    shares = {name: float(value) * 100 for name, value in histogram.compute().items()}
    assert shares["dominance_1"] == pytest.approx(golden[f"{case}/eval_2dp"][3], abs=0.0051)
    assert shares["dominance_3"] == pytest.approx(golden[f"{case}/eval_2dp"][5], abs=0.0051)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
    assert int(network(v.v + mean).logits.argmax()) == int(golden[f"{case}/uap_class"])
    assert all(bounded)


@pytest.mark.parametrize("target", [None, 3])
def test_sign_gradient(golden, target):
    network, v = SplitNetwork(build(golden)), noise(golden)
    v.clamp = True
    rule = SignGradient(target, step_size=0.05, beta=2.0, labels="given")
    craft(rule, network, v, data(golden, "x_u8", "y")[:2], 2)
    name = "spgd/delta" if target is None else "spgd_targeted/delta"
    torch.testing.assert_close(v.v.detach()[0], torch.from_numpy(golden[name]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("logit", "logit"),
        ("bounded", "bounded"),
        ("bounded_fixed_ref", "bounded_fixed_ref"),
        ("bounded_neg", "bounded_neg"),
    ],
)
def test_margin_losses(golden, kind, name):
    logits = torch.from_numpy(golden["df/logits"]).requires_grad_()
    loss = margin_loss(logits, torch.from_numpy(golden["df/target"]), 2.0, kind)
    loss.backward()
    assert float(loss) == pytest.approx(float(golden[f"df/{name}"]), abs=1e-12)
    torch.testing.assert_close(logits.grad, torch.from_numpy(golden[f"df/{name}_grad"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gd", "trm"])
def test_layer_objectives(golden, name):
    network, v = build(golden), noise(golden)
    layers = ["network.conv1", "network.conv2"]
    split = SplitNetwork(network, watched=layers)
    if name == "gd":
        rule = LayerSaturation()
        assert rule.watched(network, v.v.detach()) == layers
        loss, _ = rule.loss(split, v, {}, 0)
    else:
        rule = TruncatedRatio(p_rate=1.0, n_rate=0.5, raw_input=True)
        loss, _ = rule.loss(split, v, {"image": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}, 0)
    (gradient,) = torch.autograd.grad(loss, v.v)
    assert float(loss) == pytest.approx(float(golden[f"{name}/loss"]), abs=1e-12)
    torch.testing.assert_close(gradient, torch.from_numpy(golden[f"{name}/grad"]), rtol=0, atol=1e-12)


def test_the_older_data_free_objective():
    activations = [torch.full((1, 2, 3, 3), 2.0), -torch.ones(1, 4)]
    assert float(layer_saturation_loss(activations, "mean")) == pytest.approx(-math.log(2) - math.log(1e-9), rel=1e-5)
    ratio = truncated_ratio_loss([torch.tensor([3.0, -4.0])], 1, 1, lam=0.5)
    assert float(ratio) == pytest.approx(0.5 * math.log(2.0) - math.log(4.5), rel=1e-5)


def test_a_plain_loop_refuses_what_a_trainer_does(golden):
    network, v = SplitNetwork(build(golden), "network.fc"), noise(golden, "untargeted")
    batches = data(golden, "x_u8", "y")
    normalised = [{**batch, "image": (batch["image"] - 0.5) / 0.25} for batch in batches]
    with pytest.raises(ValueError, match=r"they must lie in \[0, 1\]: normalisation belongs to the network"):
        craft(attack(golden, "untargeted"), network, v, normalised)
    with pytest.raises(ValueError, match="can be gone through once only, but epochs is 2"):
        craft(attack(golden, "untargeted"), network, v, iter(batches), 2)
