"""MU-Mis agrees with the reference on every array of the golden file, in the plain and in the folded form."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import tensors_under
from torchlethe.functional.sensitivity import input_sensitivity, recovery_step
from torchlethe.updates import MUMisUpdate

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "mu_mis.npz") as file:
        return dict(file)


def network_of(golden, kind):
    classes = len(golden["cnn_init/8.bias"])
    if kind == "cnn":
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )
    else:
        network = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, classes))
    network.double().load_state_dict(tensors_under(golden, f"{kind}_init/"), strict=False)
    return network


class GivenClasses(MUMisUpdate):
    """The rule with the other classes of the golden file."""

    given: torch.Tensor

    def _other_classes(self, logits, label, ids, k):
        return self.given[max(k, 0)].unsqueeze(1)


def rule_of(golden, kind, **arguments):
    lr, momentum, decay = golden[f"{kind}_hp"].tolist()
    rule = GivenClasses(
        steps=4,
        rho=None,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=decay),
        **({"min_dip": 1.0, "guard": float("inf"), "monitor_every": 1} | arguments),
    )
    rule.given = torch.from_numpy(golden[f"{kind}_cprime"])
    batch = {"image": torch.from_numpy(golden[f"{kind}_x"]), "label": torch.from_numpy(golden[f"{kind}_y"])}
    return rule, batch


@pytest.mark.filterwarnings("ignore:nothing to forget")
@pytest.mark.parametrize("fold_bn", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_sensitivities_gradients_steps_and_monitor(golden, kind, fold_bn):
    network = network_of(golden, kind)
    rule, batch = rule_of(golden, kind, fold_bn=fold_bn)
    rule.configure(network)
    logs = [rule.prepare(network, {"forget": [batch]})]
    if fold_bn:
        assert rule._short_cuts.folded == ([("0", "1"), ("3", "4")] if kind == "cnn" else [])
        assert rule._short_cuts.piecewise

    for name, classes in (("target", batch["label"]), ("irrelevant", rule.given[0])):
        found = input_sensitivity(network, batch["image"], classes).square()
        torch.testing.assert_close(found, torch.from_numpy(golden[f"{kind}_sens_{name}"]), **TOLERANCE)
    *gradients, terms = rule._sums(network, batch["image"], batch["label"], torch.arange(len(batch["label"])), 0)
    expected = tensors_under(golden, f"{kind}_grad/")
    assert len(gradients) == len(expected)
    for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient / terms[2], expected[name], **TOLERANCE)

    for k in range(4):
        logs.append(rule.step(network, batch, k))
    losses = [float(entry["forget_loss"]) for entry in logs[1:]]
    np.testing.assert_allclose(losses, golden[f"{kind}_losses"], rtol=1e-9)
    assert losses[0] == pytest.approx(float(golden[f"{kind}_loss"]), rel=1e-9)
    for name, value in tensors_under(golden, f"{kind}_final/").items():
        torch.testing.assert_close(network.state_dict()[name], value, **TOLERANCE)
    for name, array in (("mis/irrelevant_sens", "oc"), ("mis/target_sens", "tc")):
        np.testing.assert_allclose([entry[name] for entry in logs], golden[f"{kind}_monitor_{array}"], rtol=1e-9)


@pytest.mark.filterwarnings("ignore:nothing to forget")
def test_train_mode_batch_norm_mixes_the_samples(golden):
    network = network_of(golden, "cnn")
    rule, batch = rule_of(golden, "cnn", bn_mode="train")
    rule.configure(network)
    rule.prepare(network, {"forget": [batch]})
    network.load_state_dict(tensors_under(golden, "cnn_init/"), strict=False)
    gradients = rule._sums(network, batch["image"], batch["label"], torch.arange(len(batch["label"])), 0)
    target, irrelevant, count = gradients[-1]
    assert float((target - irrelevant) / count) == pytest.approx(float(golden["trainbn_loss"]), rel=1e-9)
    assert float(target) == pytest.approx(golden["trainbn_sens_target"].sum(), rel=1e-9)
    assert float(target) != pytest.approx(golden["trainbn_sens_target_own"].sum(), rel=0.01)
    first = torch.from_numpy(golden["trainbn_grad/0.weight"])
    torch.testing.assert_close(gradients[0] / count, first, **TOLERANCE)
    mean = torch.from_numpy(golden["trainbn_running_mean/1"])
    torch.testing.assert_close(network[1].running_mean, mean, **TOLERANCE)


def test_the_stop_rule_holds_where_the_reference_stops(golden):
    for trace, places in zip(golden["stop_traces"], golden["stop_index"], strict=True):
        for min_dip, place in zip(golden["stop_min_dip"], places, strict=True):
            assert recovery_step(trace.tolist(), float(golden["stop_delta"]), float(min_dip)) == place
