"""MSG, CT and CFW change what they say, and no more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden_networks import Tiny, fixed_batches
from torchlethe.components.originals import randomised_copy
from torchlethe.updates import CFWUpdate, CTUpdate, MSGUpdate


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().double()


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 4
    return {
        "forget": fixed_batches(images[:16], labels[:16], 8),
        "remain": fixed_batches(images[16:], labels[16:], 8),
    }


def convolutions(network):
    return {f"{name}.weight": m.weight for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def test_ct_transposes_every_kernel_and_nothing_else(network, loaders):
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    rule = CTUpdate(sgd)
    rule.configure(network)
    logs = rule.prepare(network, loaders)
    changed = convolutions(network)
    assert changed
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name].transpose(2, 3) if name in changed else before[name]), name
    assert logs["kernel_change"] > 0


def test_cfw_adds_seeded_noise_at_the_start_and_before_the_last_epoch(network, loaders):
    before = {name: p.detach().clone() for name, p in convolutions(network).items()}
    rule = CFWUpdate(lambda p: torch.optim.SGD(p, lr=0.0), noise=0.5, last_noise=0.25, seed=3)
    rule.configure(network)
    rule.set_length(9, 3)
    rule.prepare(network, loaders)
    first = torch.cat([(p.detach() - before[name]).flatten() for name, p in convolutions(network).items()])
    assert float(first.std()) == pytest.approx(0.5, rel=0.25)
    moved = []
    for k in range(9):
        held = {name: p.detach().clone() for name, p in network.named_parameters()}
        rule.step(network, loaders["remain"][k % 3], k)
        moved.append(any(not torch.equal(p, held[name]) for name, p in network.named_parameters()))
    assert moved == [False] * 5 + [True] + [False] * 3  # with the sixth of nine steps the last epoch is next
    torch.manual_seed(0)
    again = Tiny().double()
    other = CFWUpdate(sgd, noise=0.5, seed=3)
    other.configure(again)
    other.prepare(again, loaders)
    torch.testing.assert_close(
        torch.cat([(p.detach() - before[name]).flatten() for name, p in convolutions(again).items()]), first
    )


def test_msg_draws_the_weights_anew_on_which_both_sets_agree_most_and_holds_the_others_back(network, loaders):
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.eval()
    gradients = {}
    for role, batches in loaders.items():
        image = torch.cat([batch["image"] for batch in batches])
        label = torch.cat([batch["label"] for batch in batches])
        found = torch.autograd.grad(F.cross_entropy(network(image), label), list(convolutions(network).values()))
        gradients[role] = dict(zip(convolutions(network), found, strict=True))
    network.train()
    rule = MSGUpdate(sgd, fraction=0.5, seed=1, kept_gradient=0.25)
    rule.configure(network)
    rule.prepare(network, loaders)
    fresh = dict(randomised_copy(network, 1).named_parameters())
    for (name, p), factor in zip(convolutions(network).items(), rule.factors, strict=True):
        score = (gradients["remain"][name] - gradients["forget"][name]).abs().flatten()
        chosen = torch.zeros(len(score), dtype=torch.bool)
        chosen[score.argsort()[: len(score) // 2]] = True
        chosen = chosen.view_as(p)
        torch.testing.assert_close(p.detach(), torch.where(chosen, fresh[name], before[name]))
        assert torch.equal(factor, torch.where(chosen, 1.0, 0.25).double())
    assert all(
        torch.equal(p, before[name]) for name, p in network.named_parameters() if name not in convolutions(network)
    )
    held = {name: p.detach().clone() for name, p in network.named_parameters()}
    loss = F.cross_entropy(network(loaders["remain"][0]["image"]), loaders["remain"][0]["label"])
    expected = dict(zip(held, torch.autograd.grad(loss, list(network.parameters())), strict=True))
    for name, factor in zip(rule.kernels, rule.factors, strict=True):
        expected[name] = expected[name] * factor
    rule.step(network, {"remain": loaders["remain"][0]}, 0)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), held[name] - 0.05 * expected[name])


def test_the_state_of_msg_survives_a_round_trip(network, loaders):
    first, second = (MSGUpdate(sgd) for _ in range(2))
    first.configure(network)
    first.prepare(network, loaders)
    second.configure(network)
    second.load_state_dict(first.state_dict())
    assert second.prepared
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))


@pytest.mark.parametrize("rule", [MSGUpdate(), CTUpdate(), CFWUpdate()], ids=lambda rule: type(rule).__name__)
def test_a_network_without_convolutions_is_refused(rule):
    with pytest.raises(ValueError, match="the network Sequential has no convolution, which this method changes"):
        rule.configure(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MSGUpdate(fraction=1.5), r"fraction is 1.5, it must lie in \[0, 1\]"),
        (lambda: MSGUpdate(kept_gradient=-1), "kept_gradient is -1, it must be at least 0"),
        (lambda: MSGUpdate(remain_batches=0), "remain_batches is 0, it must be at least 1"),
        (lambda: CFWUpdate(noise=-0.1), "noise is -0.1, it must be at least 0"),
        (lambda: CFWUpdate(last_noise=-0.1), "last_noise is -0.1, it must be at least 0"),
        (
            lambda: CTUpdate().configure(nn.Sequential(nn.Conv2d(1, 2, 1))),
            "no kernel of Sequential is square and larger",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_cfw_says_at_its_first_step_that_nobody_told_the_length_of_the_run(network, loaders):
    rule = CFWUpdate(sgd)
    rule.configure(network)
    rule.prepare(network, loaders)
    with pytest.raises(RuntimeError, match="CFWUpdate needs to know how long the run is"):
        rule.step(network, loaders["remain"][0], 0)
