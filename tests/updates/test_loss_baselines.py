"""The loss-type baselines do what their arguments say."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tests.golden_networks import Tiny, fixed_batches
from tests.helpers import assert_same_bits
from torchlethe.components import RandomRelabel
from torchlethe.data.hashing import random_normal
from torchlethe.functional.forget_losses import l1_norm, l1_strength, negative_preference, soft_threshold
from torchlethe.updates import (
    CFkUpdate,
    EUkUpdate,
    GradientAscentUpdate,
    JiTUpdate,
    L1SparseUpdate,
    NegGradPlusUpdate,
    NPOUpdate,
    RandomLabelUpdate,
    SalUnSoftUpdate,
    SalUnUpdate,
)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 4
    batches = {
        "forget": fixed_batches(images[:16], labels[:16], 8),
        "remain": fixed_batches(images[16:], labels[16:], 8),
    }
    for first, part in ((0, batches["forget"]), (16, batches["remain"])):
        for number, batch in enumerate(part):
            batch["index"] = first + 8 * number + torch.arange(8)
    return batches


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny().double()


def run(rule, loaders, epochs=2, network=None):
    network = tiny() if network is None else network
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


def gradient_of(network, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


# --- the preference loss ------------------------------------------------------------------------------------------


def test_npo_is_gradient_ascent_for_small_beta_and_fades_for_forgotten_samples(loaders):
    network, batch = tiny().eval(), loaders["forget"][0]
    original = tiny(1).eval()

    def terms(model):
        return F.log_softmax(model(batch["image"]), 1).gather(1, batch["label"].unsqueeze(1)).squeeze(1)

    reference = terms(original).detach()
    ascent = gradient_of(network, -F.cross_entropy(network(batch["image"]), batch["label"]))
    small = gradient_of(network, negative_preference(terms(network), reference, beta=1e-7))
    torch.testing.assert_close(small, ascent, rtol=1e-6, atol=1e-9)
    log_probs = terms(network).detach().requires_grad_()
    beta = 0.7
    negative_preference(log_probs, reference, beta).backward()
    power = ((log_probs.detach() - reference) * beta).exp()
    torch.testing.assert_close(log_probs.grad, 2 * power / (1 + power) / len(power))
    gone = torch.full_like(reference, -200.0).requires_grad_()
    negative_preference(gone, reference, beta=1.0).backward()
    assert gone.grad.abs().max() < 1e-20


def test_npo_compares_with_the_original_model_throughout(loaders):
    rule = NPOUpdate(sgd, beta=0.5)
    start = tiny()
    network = run(rule, loaders)
    assert_same_bits(rule.original, start)
    assert not any(p.requires_grad for p in rule.original.parameters())
    again = NPOUpdate(sgd, beta=0.5)
    again.configure(copy.deepcopy(network))
    again.load_state_dict(rule.state_dict())
    assert_same_bits(again.original, start)


# --- modes of BatchNorm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GradientAscentUpdate, NegGradPlusUpdate, NPOUpdate, RandomLabelUpdate, JiTUpdate])
def test_bn_eval_leaves_the_statistics_alone_and_train_does_not(make, loaders):
    start = tiny()
    for mode, moved in (("eval", False), ("train", True)):
        network = run(make(bn_mode=mode), loaders, epochs=1)
        assert torch.equal(network.bn1.running_mean, start.bn1.running_mean) is not moved
        assert network.bn1.training


def test_bn_remain_gathers_statistics_of_remaining_batches_only(loaders):
    def nowhere(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    mixed = run(NegGradPlusUpdate(nowhere, bn_mode="remain"), loaders, epochs=1)
    alone = tiny().train()
    for batch in loaders["remain"]:
        alone(batch["image"])
    torch.testing.assert_close(mixed.bn2.running_mean, alone.bn2.running_mean)
    assert mixed.bn2.num_batches_tracked == len(loaders["remain"])


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_a_function_of_seed_pass_and_sample():
    label, index = torch.arange(400) % 4, torch.arange(400)
    batch = {"label": label, "index": index, "epoch": torch.zeros_like(index)}
    drawn = RandomRelabel(seed=3)(batch, 4, k=0)
    assert torch.equal(drawn, RandomRelabel(seed=3)(batch, 4, k=99))
    order = torch.randperm(400)
    shuffled = {name: value[order] for name, value in batch.items()}
    assert torch.equal(RandomRelabel(seed=3)(shuffled, 4, k=5), drawn[order])
    assert torch.equal(torch.bincount(drawn, minlength=4) > 70, torch.ones(4, dtype=torch.bool))
    assert 0.15 < (drawn == label).float().mean() < 0.35
    assert (RandomRelabel(seed=4)(batch, 4, 0) != drawn).float().mean() > 0.5
    later = batch | {"epoch": torch.ones_like(index)}
    assert (RandomRelabel(seed=3)(later, 4, 0) != drawn).float().mean() > 0.5
    assert torch.equal(RandomRelabel(redraw="once")(later, 4, 0), RandomRelabel(redraw="once")(batch, 4, 1))


def test_other_labels_are_never_the_true_ones():
    batch = {"label": torch.arange(3000) % 3, "index": torch.arange(3000)}
    drawn = RandomRelabel("other", "once")(batch, 3, 0)
    step = (drawn - batch["label"]) % 3
    assert set(step.tolist()) == {1, 2}
    assert abs((step == 1).float().mean() - 0.5) < 0.05


def test_batches_without_an_index_are_drawn_by_step_and_refused_for_labels_drawn_once():
    batch = {"label": torch.zeros(50, dtype=torch.long)}
    assert not torch.equal(RandomRelabel()(batch, 10, 0), RandomRelabel()(batch, 10, 1))
    with pytest.raises(ValueError, match="have no `index` to know a sample by"):
        RandomRelabel(redraw="once")(batch, 10, 0)


def test_a_joined_batch_relabels_its_forget_part_only(loaders):
    rule = RandomLabelUpdate(order="joined", labels="other", redraw="once")
    network = tiny()
    forget, remain = loaders["forget"][0], loaders["remain"][0]
    joined = {name: torch.cat([forget[name], remain[name]]) for name in forget}
    joined["is_forget"] = torch.arange(16) < 8
    loss, _ = rule.loss(network, joined, 0)
    labels = torch.cat([rule.relabel(forget, 4, 0), remain["label"]])
    torch.testing.assert_close(loss, F.cross_entropy(network(joined["image"]), labels))
    with pytest.raises(ValueError, match="neither `is_forget` nor the roles"):
        rule.loss(network, remain, 0)


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adamw"])
def test_a_strict_mask_holds_its_weights_bit_for_bit_and_a_loose_one_does_not(optimizer, loaders):
    start = dict(tiny().named_parameters())
    for strict in (True, False):
        rule = SalUnUpdate(optimizer, mask_fraction=0.5, strict_mask=strict)
        network = run(rule, loaders)
        held = {name: mask == 0 for name, mask in rule.mask.masks.items()}
        assert rule.mask.kept_fraction() == pytest.approx(0.5, abs=0.01)
        same = [torch.equal(p[held[name]], start[name][held[name]]) for name, p in network.named_parameters()]
        assert all(same) is strict
        assert any(not torch.equal(p[~held[name]], start[name][~held[name]]) for name, p in network.named_parameters())
        for p, where in zip(network.parameters(), held.values(), strict=True):
            for key, state in rule.optimizers[0].state[p].items():
                if strict and key != "step":
                    assert not state[where].any()


def test_a_mask_that_keeps_all_is_no_mask(loaders):
    all_weights = run(SalUnUpdate(sgd, mask_fraction=1.0), loaders)
    assert_same_bits(all_weights, run(RandomLabelUpdate(sgd), loaders))


def test_the_soft_mask_keeps_its_share_at_theta_0_and_thaws(loaders):
    start = torch.cat([p.detach().flatten() for p in tiny().parameters()])
    rule, shares = SalUnSoftUpdate(sgd, mask_ratio=0.8), []
    after = rule.after_optimizer_step

    def counted(k):
        after(k)
        shares.append(float((torch.cat([p.flatten() for p in rule.parameters]) == start).double().mean()))

    rule.after_optimizer_step = counted
    run(rule, loaders, epochs=3)
    steps, weights = len(shares), len(start)
    # one θ0 for the whole run, and the share falls with every step, not with every epoch
    expected = [math.floor(0.8 * (1 - k / steps) * weights) / weights for k in range(steps)]
    assert shares == pytest.approx(expected, abs=1.5 / weights)
    assert_same_bits(run(SalUnSoftUpdate(sgd, mask_ratio=0.0), loaders), run(RandomLabelUpdate(sgd), loaders))


def test_soft_thresholding_shrinks():
    found = soft_threshold(torch.tensor([-3.0, -1.0, 0.5, 2.0]), torch.tensor(1.0))
    assert torch.equal(found, torch.tensor([-2.0, 0.0, 0.0, 1.0]))


# --- the others ---------------------------------------------------------------------------------------------------


def test_the_l1_penalty_is_what_autograd_makes_of_the_absolute_values_and_ends_in_time(loaders):
    network = tiny()
    weights = list(network.parameters())
    reference = sum(p.abs().sum() for p in weights)
    torch.testing.assert_close(l1_norm(weights), reference)
    torch.testing.assert_close(gradient_of(network, l1_norm(weights)), gradient_of(network, reference))
    assert [l1_strength(1.0, e, 5, 2) for e in range(5)] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    sizes = [l1_norm(run(L1SparseUpdate(sgd, alpha=a), loaders).parameters()).item() for a in (0.0, 0.1)]
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("make", [L1SparseUpdate, SalUnSoftUpdate])
def test_a_schedule_over_the_run_needs_its_length(make, loaders):
    rule, network = make(), tiny()
    rule.configure(network)
    with pytest.raises(RuntimeError, match="needs to know how long the run is"):
        rule.prepare(network, loaders)


@pytest.mark.parametrize("make", [CFkUpdate, EUkUpdate])
def test_only_the_last_blocks_move(make, loaders):
    class Named(Tiny):
        """With a head under a name that is found."""

    torch.manual_seed(0)
    start = Named().double()
    rule = make(sgd, blocks=1)
    network = run(rule, loaders, network=copy.deepcopy(start))
    assert rule.trained == ["conv2", "bn2", "fc"]
    assert_same_bits(network.conv1, start.conv1)
    assert_same_bits(network.bn1, start.bn1)
    assert not torch.equal(network.conv2.weight, start.conv2.weight)
    assert not torch.equal(network.bn2.running_mean, start.bn2.running_mean)
    rule.finish(network)
    assert all(p.requires_grad for p in network.parameters())


def test_eu_k_starts_anew_and_cf_k_does_not():
    start, fresh = tiny(), tiny()
    for rule in (CFkUpdate(blocks=["fc"]), EUkUpdate(blocks=["fc"], seed=5)):
        network = copy.deepcopy(start)
        rule.configure(network)
        rule.prepare(network, {})
        assert torch.equal(network.fc.weight, start.fc.weight) is isinstance(rule, CFkUpdate)
        assert torch.equal(network.conv2.weight, start.conv2.weight)
    again = EUkUpdate(blocks=["fc"], seed=5)
    again.configure(fresh)
    again.prepare(fresh, {})
    assert_same_bits(fresh.fc, network.fc)


def test_noise_is_standard_normal_and_follows_the_sample():
    index = torch.arange(2000)
    noise = random_normal(0, 3, index, (4, 5))
    assert noise.shape == (2000, 4, 5)
    assert noise.abs().max() < 5.2
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(noise.pow(4).mean() - 3) < 0.2
    order = torch.randperm(2000)
    assert torch.equal(random_normal(0, 3, index[order], (4, 5)), noise[order])
    assert (
        abs(torch.corrcoef(torch.stack([noise.flatten(), random_normal(1, 3, index, (4, 5)).flatten()]))[0, 1]) < 0.02
    )


def test_jit_is_the_mean_ratio_of_changes_with_the_noisy_branch_held(loaders):
    rule, network, batch = JiTUpdate(draws=3, sigma=0.2), tiny().eval(), loaders["forget"][0]
    loss, _ = rule.loss(network, batch, 0)
    ratios = []
    for draw in range(3):
        noise = rule.noise(batch, 0, draw)
        assert abs(noise.std() - 0.2) < 0.02
        for x, xi in zip(batch["image"], noise, strict=True):
            moved = network(x[None]) - network((x + xi)[None]).detach()
            ratios.append(moved.norm() / xi.norm())
    naive = torch.stack(ratios).mean()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient_of(network, loss), gradient_of(network, naive))


def test_jit_needs_no_labels(loaders):
    blind = {role: [b | {"label": torch.zeros_like(b["label"])} for b in part] for role, part in loaders.items()}
    seen = run(JiTUpdate(sgd), loaders)
    assert_same_bits(seen, run(JiTUpdate(sgd), blind))
    assert not torch.equal(seen.fc.weight, tiny().fc.weight)


def test_ascent_that_has_exploded_is_said(loaders):
    rule = NegGradPlusUpdate(lambda parameters: torch.optim.SGD(parameters, lr=1e6), alpha=0.0, bn_mode="eval")
    network = run(rule, loaders, epochs=60)
    with pytest.warns(UserWarning, match="NegGradPlusUpdate has left weights that are not finite: lower"):
        rule.finish(network)


def test_a_new_run_forgets_the_old_one(loaders):
    for rule in (SalUnUpdate(), NPOUpdate(), SalUnSoftUpdate(), EUkUpdate(blocks=["fc"])):
        run(rule, loaders, epochs=1)
        assert rule.prepared
        rule.configure(tiny())
        assert not rule.prepared


def test_a_step_before_the_preparation_is_refused(loaders):
    step = {"forget": loaders["forget"][0], "remain": loaders["remain"][0]}
    for rule in (SalUnUpdate(), NPOUpdate(), SalUnSoftUpdate()):
        with pytest.raises(RuntimeError, match=r"before configure\(network\) and prepare"):
            rule.loss(tiny(), step, 0)


@pytest.mark.parametrize(
    ("make", "arguments", "sentence"),
    [
        (GradientAscentUpdate, {"clip": 0.0}, "clip is 0.0, it must be above 0"),
        (GradientAscentUpdate, {"bn_mode": "x"}, "bn_mode is 'x', allowed are train, eval and remain"),
        (NegGradPlusUpdate, {"alpha": 1.5}, r"alpha is 1.5, it must lie in \[0, 1\]"),
        (NPOUpdate, {"beta": 0.0}, "beta is 0.0, it must be above 0"),
        (NPOUpdate, {"remain_weight": -1.0}, "remain_weight is -1.0"),
        (RandomLabelUpdate, {"order": "x"}, "order is 'x', allowed are sequential and joined"),
        (RandomLabelUpdate, {"labels": "x"}, "labels is 'x', allowed are all and other"),
        (RandomLabelUpdate, {"redraw": "x"}, "redraw is 'x', allowed are epoch and once"),
        (RandomLabelUpdate, {"order": "joined", "bn_mode": "remain"}, "bn_mode is 'remain', which needs order"),
        (SalUnUpdate, {"mask_fraction": 2.0}, "mask_fraction is 2.0"),
        (SalUnSoftUpdate, {"mask_ratio": -0.1}, "mask_ratio is -0.1"),
        (L1SparseUpdate, {"alpha": -1.0}, "alpha is -1.0, it must be at least 0"),
        (L1SparseUpdate, {"no_l1_epochs": -1}, "no_l1_epochs is -1"),
        (CFkUpdate, {"blocks": -1}, "blocks is -1"),
        (JiTUpdate, {"draws": 0}, "draws is 0"),
        (JiTUpdate, {"sigma": 0.0}, "sigma is 0.0"),
    ],
)
def test_wrong_arguments_are_one_sentence(make, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [(9, "blocks is 9, but the network has 2 in front of its head"), (["body"], "blocks names 'body'")],
)
def test_blocks_that_the_network_does_not_have_are_refused(blocks, sentence):
    with pytest.raises(ValueError, match=sentence):
        CFkUpdate(blocks=blocks).configure(tiny())
