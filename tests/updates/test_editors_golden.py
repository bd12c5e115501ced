"""The one-shot editors agree with the official code on every array of the golden file."""

import numpy as np
import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches, tensors_under
from torchlethe.components.sample_gradients import mean_gradient, per_sample_gradients
from torchlethe.updates import FisherForgettingUpdate, InfluenceUpdate, SSDUpdate
from torchlethe.updates.influence import first_gradient


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "mu_baselines.npz") as file:
        return dict(file)


@pytest.fixture
def network(golden):
    network = Tiny().double()
    assert not network.load_state_dict(tensors_under(golden, "init."), strict=False).unexpected_keys
    return network


@pytest.fixture(scope="module")
def loaders(golden):
    x = {name: torch.from_numpy(golden[name]) for name in ("x_forget", "y_forget", "x_retain", "y_retain")}
    joined = torch.cat([x["x_retain"], x["x_forget"]]), torch.cat([x["y_retain"], x["y_forget"]])
    return {
        "forget": fixed_batches(x["x_forget"], x["y_forget"], 8),
        "remain": fixed_batches(x["x_retain"], x["y_retain"], 8),
        "train": fixed_batches(*joined, 8),
    }


def assert_golden(found, golden, prefix, tolerance=1e-12):
    expected = tensors_under(golden, prefix)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].detach(), value, rtol=tolerance, atol=tolerance, msg=f"{prefix}{key}")


def prepared(rule, network, loaders):
    rule.configure(network)
    rule.prepare(network, {role: loaders[role] for role in rule.reads})
    return rule


def test_ssd_importances_and_edit(golden, network, loaders):
    rule = SSDUpdate(alpha=float(golden["ssd_alpha"]), lam=float(golden["ssd_lambda"]))
    prepared(rule, network, loaders)
    assert_golden(rule.forget_importance, golden, "ssd_imp_forget.")
    assert_golden(rule.full_importance, golden, "ssd_imp_full.")
    rule.step(network, {}, 0)
    assert_golden(dict(network.named_parameters()), golden, "ssd_params.")


def test_influence_as_coded(golden, network, loaders):
    rule = InfluenceUpdate(alpha=float(golden["iu_alpha"]))
    prepared(rule, network, loaders).step(network, {}, 0)
    assert_golden(dict(network.named_parameters()), golden, "iu_params.")


def test_the_published_recursion_stays_on_the_line_of_the_first_gradient(golden, network, loaders):
    """The recursion as written, over single samples, ends where our inner products say."""
    rule = prepared(InfluenceUpdate(), network, loaders)
    forget, size = mean_gradient(network, loaders["forget"])
    remain, rest = mean_gradient(network, loaders["remain"])
    k = torch.cat([((f - r) * size / (size + rest)).flatten() for f, r in zip(forget, remain, strict=True)])
    first = torch.cat([g.flatten() for g in first_gradient(network, loaders["remain"])])
    singles = [g for found, _ in per_sample_gradients(network, loaders["remain"], 8) for g in zip(*found, strict=True)]
    o = first.clone()
    for sample in singles[1:]:
        g = -torch.cat([part.flatten() for part in sample])  # per-sample gradients are of the log-probability
        a = o @ g
        k, o = k - (k @ g) / (1000 + a) * o, o - a / (1000 + a) * o
        assert float(torch.nn.functional.cosine_similarity(o, first, dim=0)) == pytest.approx(1.0, abs=1e-12)
    found = torch.cat([d.flatten() for d in rule.direction])
    torch.testing.assert_close(found, k, rtol=1e-12, atol=1e-13)


def test_fisher_new(golden, network, loaders):
    rule = FisherForgettingUpdate(alpha=float(golden["fisher_new_alpha"]), head_rule="as_coded", chunk_size=3)
    prepared(rule, network, loaders)
    assert_golden(rule.information, golden, "fisher_new_grad2.")
    variances = {name: scale**2 for name, scale in rule.noise_scales(network).items()}
    assert_golden(variances, golden, "fisher_new_var.")


def test_the_head_is_identified_in_a_net_whose_convolution_has_as_many_filters(network, loaders):
    scales = {}
    for head_rule in ("as_coded", "identified"):
        rule = FisherForgettingUpdate(alpha=1e-6, head_rule=head_rule)
        scales[head_rule] = prepared(rule, network, loaders).noise_scales(network)
    assert not torch.equal(scales["as_coded"]["conv1.weight"], scales["identified"]["conv1.weight"])
    for name in ("conv2.weight", "bn2.bias", "fc.weight", "fc.bias"):
        assert torch.equal(scales["as_coded"][name], scales["identified"][name])


def test_empirical_fisher(golden, network, loaders):
    rule = FisherForgettingUpdate("fisher", chunk_size=5)
    prepared(rule, network, loaders)
    assert_golden(rule.information, golden, "fisher_empirical_persample.")
