"""SFRon's search for its strength: what it finds, what it leaves untouched, what it refuses and warns of."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import Tiny, fixed_batches
from tests.helpers import assert_same_bits
from torchlethe.components import restored
from torchlethe.updates import SFRonUpdate
from torchlethe.updates.strength import find_strength, geometric_probe, mean_loss, occurring


def problem(memorised=True):
    """A network that knows its training data by heart, and data that it has not seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(56, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(56) % 4
    parts = {"forget": slice(0, 8), "remain": slice(8, 40), "validation": slice(40, 56)}
    loaders = {role: fixed_batches(images[part], labels[part], 8) for role, part in parts.items()}
    torch.manual_seed(0)
    network = Tiny().double()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(300 if memorised else 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[:40]), labels[:40]).backward()
        optimizer.step()
    network.zero_grad()
    return network, loaders


def auto(network, loaders, **arguments):
    rule = SFRonUpdate(**{"steps": 40, "forget_every": 2, "alpha": "auto", "auto_alpha_steps": 20} | arguments)
    rule.configure(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rule, rule.prepare(network, loaders)


def test_the_trials_end_on_both_sides_of_the_level_of_unseen_data():
    network, loaders = problem()
    target = 2 * mean_loss(network, loaders["forget"])[0]
    rule, logs = auto(network, loaders, auto_alpha_target=target)
    below = [alpha for alpha, loss in rule.alpha_trials.items() if loss < target]
    above = [alpha for alpha, loss in rule.alpha_trials.items() if loss >= target]
    assert max(below) <= rule.alpha <= min(above)
    assert min(above) == 2 * max(below)
    assert logs["auto_alpha"] == rule.alpha
    assert logs["auto_alpha_target"] == target
    assert logs[f"auto_alpha_loss/{min(above):g}"] == rule.alpha_trials[min(above)]
    level, _ = mean_loss(network, loaders["validation"])
    assert auto(network, loaders)[1]["auto_alpha_target"] == level


def test_a_trial_leaves_no_trace():
    network, loaders = problem()
    network.bn1.eval()  # a layer that the user froze
    network.fc.weight.grad = torch.ones_like(network.fc.weight)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002

    class Noisy(list):
        def __iter__(self):
            random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
            return super().__iter__()

    rule, _ = auto(network, {role: Noisy(batches) for role, batches in loaders.items()}, mask="none")
    assert len(rule.alpha_trials) > 1
    assert_same_bits(network, state)
    assert [network.training, network.bn1.training, network.bn2.training] == [True, False, True]
    assert torch.equal(network.fc.weight.grad, torch.ones_like(network.fc.weight))
    assert network.conv1.weight.grad is None
    assert not any(optimizer.state for optimizer in rule.optimizers)
    found = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    # the mask is not measured here, so nothing else drew from the generators
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])


def test_what_fails_inside_is_put_back_too():
    network, _ = problem(memorised=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def trial():
        with restored(network):
            network.fc.weight.data.zero_()
            network.bn1.running_mean = torch.ones(4, dtype=torch.float64)
            network.eval()
            raise KeyError

    with pytest.raises(KeyError):
        trial()
    assert_same_bits(network, before)
    assert network.training


def test_the_rule_with_the_strength_found_is_the_rule_with_that_number():
    probed, loaders = problem()
    found, _ = auto(probed, loaders)
    network, _ = problem()
    given = SFRonUpdate(steps=40, forget_every=2, alpha=found.alpha)
    given.configure(network)
    given.prepare(network, loaders)
    for k in range(4):
        batch = {"forget": loaders["forget"][0], "remain": loaders["remain"][k]}
        found.step(probed, batch, k)
        given.step(network, batch, k)
    assert_same_bits(probed, network)


def test_the_strength_is_saved_and_not_probed_again():
    network, loaders = problem()
    rule, _ = auto(network, loaders)
    other = SFRonUpdate(steps=40, forget_every=2, alpha="auto")
    other.configure(network)
    assert other.alpha != other.alpha
    other.load_state_dict(rule.state_dict())
    assert other.prepared
    assert (other.alpha, other.alpha_trials) == (rule.alpha, rule.alpha_trials)
    given = SFRonUpdate(alpha=7.0)
    given.configure(network)
    given.load_state_dict(rule.state_dict())
    assert given.alpha == 7.0


def test_whole_classes_need_a_target_and_nothing_to_forget_is_said():
    network, loaders = problem()
    (batch,) = loaders["forget"]
    alone = [{name: value[batch["label"] == 2] for name, value in batch.items()}]
    others = [{name: value[part["label"] != 2] for name, value in part.items()} for part in loaders["remain"]]
    whole = loaders | {"forget": alone, "remain": others}
    with pytest.raises(ValueError, match=r"all of class 2 is to be forgotten.*give auto_alpha_target or a number"):
        find_strength(network, whole, lambda alpha: alpha)
    assert find_strength(network, whole, lambda alpha: alpha, target=30.0)[1].keys() == {25.0, 50.0}
    with pytest.warns(UserWarning, match="nothing to forget"):
        assert find_strength(network, loaders, lambda alpha: alpha, target=1e-9)[0] == 25
    with pytest.warns(UserWarning, match="lower forget_every or raise the learning rate"):
        find_strength(network, loaders, lambda alpha: 0.0, target=5.0)
    with pytest.warns(UserWarning, match="raise forget_every"):
        find_strength(network, loaders, lambda alpha: 9.0, target=5.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda s: s / 100, 100.0),  # up, exactly met
        (lambda s: s, 25 / 16),  # down, stops at the number of trials
        (lambda s: float("nan") if s > 30 else 0.1, 25.0),  # what diverges is past the target
        (lambda s: float("inf") if s > 10 else 0.1, 6.25),
    ],
)
def test_the_search_brackets_the_target(loss, expected):
    found, tried = geometric_probe(loss, target=1.0, start=25.0, probes=5)
    assert found == pytest.approx(expected)
    assert len(tried) <= 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"alpha": "large"}, "alpha is 'large', allowed are a number above 0 and auto"),
        ({"alpha": "auto", "auto_alpha_steps": 0}, "auto_alpha_steps is 0"),
        ({"alpha": "auto", "auto_alpha_target": -1.0}, "auto_alpha_target is -1.0, it must be above 0"),
        ({"auto_alpha_target": 1.0}, r"auto_alpha_target is 1.0, but alpha is 25.0: set alpha to auto"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SFRonUpdate(**arguments)


def test_only_the_level_needs_held_out_data():
    assert SFRonUpdate(alpha="auto").reads == {"forget", "remain", "validation"}
    assert SFRonUpdate(alpha="auto", auto_alpha_target=1.0).reads == {"forget", "remain"}
    assert SFRonUpdate().reads == {"forget", "remain"}


def test_the_classes_that_remain_are_read_no_further_than_needed():
    read = []

    def batches():
        for number, labels in enumerate(([0, 1, -100], [1, 3], [2, 2])):
            read.append(number)
            yield {"image": torch.zeros(len(labels), 1, 2, 2), "label": torch.tensor(labels)}

    assert occurring(batches(), {1, 3}) == {1, 3}
    assert read == [0, 1]
    assert occurring(batches(), {0, 5}) == {0}
