"""The loss-type baselines agree with the official code on the golden file."""

import numpy as np
import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches, tensors_under
from torchlethe.updates import (
    FineTuneUpdate,
    GradientAscentUpdate,
    L1SparseUpdate,
    NegGradPlusUpdate,
    RandomLabelUpdate,
    SalUnUpdate,
)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.013, momentum=0.9, weight_decay=5e-4)


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
    return {
        "forget": fixed_batches(x["x_forget"], x["y_forget"], int(golden["batch_forget"])),
        "remain": fixed_batches(x["x_retain"], x["y_retain"], int(golden["batch_retain"])),
    }


def run(rule, network, loaders, epochs):
    """Follow the rule's own feed over fixed batches, in train mode."""
    rule.configure(network)
    batches = {role: len(loaders[role]) for role in rule.reads}
    rule.set_length(epochs * rule.feed.length(batches), rule.feed.length(batches))
    rule.prepare(network, loaders)
    network.train()
    k = 0
    for epoch in range(epochs):
        for draws in rule.feed.plan(batches, epoch):
            step = {role: loaders[role][draw % batches[role]] for role, draw in draws.items()}
            rule.step(network, step if len(rule.reads) > 1 else next(iter(step.values())), k)
            k += 1
    return network


def assert_official(network, golden, case):
    expected = tensors_under(golden, f"{case}.")
    assert len(expected) > 10
    for key, value in expected.items():
        torch.testing.assert_close(
            network.state_dict()[key], value, rtol=0, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


CASES = {
    "ft_2ep": (lambda: FineTuneUpdate(sgd), 2),
    "ft_l1_2ep": (lambda: L1SparseUpdate(sgd, alpha=5e-4), 2),
    "ga_train_mode_1ep": (lambda: GradientAscentUpdate(sgd, bn_mode="train", clip=float("inf")), 1),
    "ga_eval_mode_clip_1ep": (lambda: GradientAscentUpdate(sgd, bn_mode="eval", clip=0.1), 1),
    "neggradplus_1ep": (lambda: NegGradPlusUpdate(lambda p: torch.optim.SGD(p, lr=0.013), alpha=0.9), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_in_the_official_state(case, golden, network, loaders):
    make, epochs = CASES[case]
    assert_official(run(make(), network, loaders, epochs), golden, case)


@pytest.mark.parametrize("case", ["random_label_2ep", "salun_2ep"])
def test_random_labels_end_in_the_official_state(case, golden, network, loaders):
    drawn = iter(torch.from_numpy(golden["rl_labels"]).flatten())
    rule = RandomLabelUpdate(sgd) if case == "random_label_2ep" else SalUnUpdate(sgd, mask_fraction=0.5)
    # the labels that the official run drew, in the order in which it read the samples
    rule.relabel = lambda batch, num_classes, k: torch.stack([next(drawn) for _ in batch["label"]])
    assert_official(run(rule, network, loaders, epochs=2), golden, case)
    assert next(drawn, None) is None


def test_the_saliency_mask_is_exact(golden, network, loaders):
    rule = SalUnUpdate(mask_fraction=0.5)
    rule.configure(network)
    rule.prepare(network, loaders)
    expected = tensors_under(golden, "salun_mask_0.5.")
    assert rule.mask.masks.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(rule.mask.masks[key], value.double()), key
