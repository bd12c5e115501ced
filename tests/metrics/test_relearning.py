import copy

import pytest
import torch
from torch import nn

from torchlethe.functional.relearning import relearning_target
from torchlethe.metrics.relearning import RelearningSettings, choose_samples, relearn


def blobs(count=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    return torch.randn(count, 8, generator=generator) + 3 * torch.eye(classes, 8)[labels], labels


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).eval()


def run(net, target=90.0, **settings):
    net = copy.deepcopy(net)
    images, labels = blobs()
    found = relearn(net, list(net.parameters()), images, labels, target, RelearningSettings(**settings))
    return found, net


def test_the_original_needs_no_step():
    found, trained = run(network(), target=90.0, lr=0.1)
    assert found.reached
    assert found.steps > 0
    again, unchanged = run(trained, target=relearning_target(found.curve[-1], 5.0))
    assert (again.steps, again.reached, len(again.curve)) == (0, True, 1)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), unchanged.parameters(), strict=True))


def test_it_is_a_pure_function_of_weights_and_settings():
    state = torch.get_rng_state()
    first, one = run(network(), lr=0.05)
    torch.manual_seed(123)
    second, two = run(network(), lr=0.05)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.set_rng_state(state)
    run(network(), lr=0.05)
    assert torch.equal(state, torch.get_rng_state())
    assert (
        run(network(), lr=0.05, seed=1, batch_size=7)[0].curve != run(network(), lr=0.05, seed=2, batch_size=7)[0].curve
    )


def test_steps_are_capped_and_counted_between_checks():
    found, _ = run(network(), target=101.0, max_steps=5)
    assert (found.steps, found.reached, len(found.curve)) == (5, False, 6)
    rare, _ = run(network(), lr=0.1, every=4)
    often, _ = run(network(), lr=0.1, every=1)
    assert rare.steps == -(-often.steps // 4) * 4
    assert run(network(), target=101.0, max_steps=5, every=4)[0].curve[-1] == found.curve[-1]


def test_the_loss_can_be_the_criterion():
    found, _ = run(network(), target=0.5, criterion="loss", lr=0.1)
    assert found.reached
    assert found.curve[-1] <= 0.5 < found.curve[-2]


def test_a_diverged_model_does_not_come_back():
    found, _ = run(network(), lr=1e30, max_steps=50)
    assert (found.steps, found.reached) == (50, False)
    broken = network()
    nn.init.constant_(broken[0].weight, float("nan"))
    assert not run(broken)[0].reached


def test_running_statistics_stay():
    net = network()
    _, after = run(net, lr=0.1)
    assert torch.equal(net[1].running_mean, after[1].running_mean)


def test_large_forget_sets_are_sampled():
    settings = RelearningSettings(samples=10, seed=3)
    chosen = choose_samples(1000, settings)
    assert len(chosen) == len(chosen.unique()) == 10
    assert torch.equal(chosen, choose_samples(1000, settings))
    assert torch.equal(chosen, chosen.sort().values)
    assert not torch.equal(chosen, choose_samples(1000, RelearningSettings(samples=10, seed=4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"relearning.lr is 0.0, it must lie in \(0, inf\)"),
        ({"margin": -1}, r"relearning.margin is -1, it must lie in \[0, inf\)"),
        ({"momentum": 1.0}, r"relearning.momentum is 1.0, it must lie in \[0, 1\)"),
        ({"max_steps": 0}, "relearning.max_steps is 0, it must be at least 1"),
        ({"criterion": "f1"}, "relearning.criterion is 'f1', allowed are accuracy and loss"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        RelearningSettings(**settings)


def test_wrong_samples_are_refused():
    net = network()
    with pytest.raises(ValueError, match="as many labels as images"):
        relearn(net, list(net.parameters()), torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), 50.0)
    with pytest.raises(ValueError, match="at least one parameter"):
        relearn(net, [], *blobs(), 50.0)
