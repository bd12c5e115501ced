"""The methods with teachers, borders and noise do what they say."""

import copy

import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches
from tests.helpers import assert_same_bits
from torchlethe.components.originals import randomised_copy, weights_hash
from torchlethe.models import Normalize, NormalizedClassifier
from torchlethe.updates import BadTeacherUpdate, BoundaryExpandUpdate, BoundaryShrinkUpdate, SCRUBUpdate, UNSIRUpdate


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().double().train()


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.cat([torch.zeros(12, dtype=torch.long), torch.arange(28) % 3 + 1])
    parts = {"forget": slice(0, 12), "remain": slice(12, 40), "validation": slice(0, 20)}
    return {role: fixed_batches(images[part], labels[part], 8) for role, part in parts.items()}


def run(rule, network, loaders, steps=None):
    """The rule's own order of batches, through its feed."""
    rule.configure(network)
    passes = {role: len(batches) for role, batches in loaders.items()}
    rule.set_passes(passes)
    rule.prepare(network, loaders)
    logs = []
    for k, draws in enumerate(rule.feed.plan(passes)):
        if k == steps:
            break
        batch = {role: loaders[role][draw % passes[role]] for role, draw in draws.items()}
        logs.append(rule.step(network, batch, k))
    return logs


def test_the_original_is_a_frozen_copy_outside_the_state(network, loaders):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rule = SCRUBUpdate(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run(rule, network, loaders)
    assert_same_bits(before, rule.original)
    assert not rule.original.training
    assert not any(p.requires_grad for p in rule.original.parameters())
    assert set(rule.state_dict()) == {"prepared", "history", "chosen", "original"}
    assert rule.state_dict()["original"] == weights_hash(rule.original)


def test_a_resumed_rule_compares_with_the_original_it_was_given(network, loaders):
    original = copy.deepcopy(network)
    rule = BoundaryShrinkUpdate()
    rule.keep_original(original)
    with torch.no_grad():
        network.fc.weight.add_(1.0)  # the weights of a checkpoint
    rule.configure(network)
    assert_same_bits(rule.original, original)
    state = rule.state_dict()
    stranger = BoundaryShrinkUpdate()
    stranger.configure(network)
    with pytest.raises(ValueError, match="made with the original weights") as caught:
        stranger.load_state_dict(state)
    assert "\n" not in str(caught.value)
    rule.load_state_dict(state)
    with pytest.raises(RuntimeError, match="no original network before configure"):
        BoundaryShrinkUpdate().neighbours(loaders["forget"][0]["image"], loaders["forget"][0]["label"])


def test_scrub_takes_its_phases_in_order_and_lowers_the_learning_rate(network, loaders):
    rule = SCRUBUpdate(
        epochs=3,
        msteps=1,
        lr_schedule="milestones",
        milestones=[1, 2],
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    )
    logs = run(rule, network, loaders)
    kinds = ["forget_divergence" if "forget_divergence" in log else "remain_loss" for log in logs]
    assert kinds == ["forget_divergence"] * 2 + ["remain_loss"] * 12
    assert rule.steps == len(logs) == 14
    rates = [log["lr"] for log in logs]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 4)
    assert float(logs[0]["forget_divergence"]) > 0  # batch statistics here, running ones in the teacher
    with pytest.raises(RuntimeError, match="needs set_passes"):
        SCRUBUpdate().place(0)


def test_scrub_r_returns_the_epoch_closest_to_the_held_out_error(network, loaders):
    rule = SCRUBUpdate(epochs=3, msteps=2, rewind=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    assert rule.reads == {"forget", "remain", "validation"}
    ends, states, errors = [5, 11, 15], [], []
    rule.configure(network)
    passes = {role: len(batches) for role, batches in loaders.items()}
    rule.set_passes(passes)
    rule.prepare(network, loaders)
    for k, draws in enumerate(rule.feed.plan(passes)):
        ((role, draw),) = draws.items()
        logs = rule.step(network, {role: loaders[role][draw % passes[role]]}, k)
        if k in ends:
            errors.append(logs["forget_error"])
            history = rule.history or states
            states = [entry.get("state", entry) for entry in history]
        if k == 11:
            resumed = SCRUBUpdate(epochs=3, msteps=2, rewind=True)
            resumed.keep_original(rule.original)
            resumed.configure(network)
            resumed.load_state_dict(rule.state_dict())
            assert [past["error"] for past in resumed.history] == errors
            assert not resumed.prepared
    gaps = [abs(error - logs["held_out_error"]) for error in errors]
    assert rule.chosen_epoch == gaps.index(min(gaps)) == logs["rewound_to_epoch"] - 1
    if rule.chosen_epoch < 2:
        assert_same_bits(network, states[rule.chosen_epoch])


def test_scrub_r_without_held_out_samples_of_the_classes_says_so(network, loaders):
    rule = SCRUBUpdate(epochs=1, msteps=1, rewind=True)
    with pytest.raises(ValueError, match="no sample of the forget set's classes"):
        run(rule, network, loaders | {"validation": loaders["remain"]})


def test_the_bad_teacher_knows_nothing_and_keeps_the_normalisation(network):
    wrapped = NormalizedClassifier(network, Normalize([0.3], [0.2]))
    first, again, other = (randomised_copy(wrapped, seed) for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert not torch.equal(first.network.fc.weight, other.network.fc.weight)
    assert not torch.equal(first.network.fc.weight, network.fc.weight)
    assert torch.equal(first.normalize.mean, wrapped.normalize.mean)
    assert torch.equal(first.network.bn1.running_mean, torch.zeros(4))
    assert not first.training


def test_bad_teaching_takes_joined_batches_and_batches_by_role(network, loaders):
    rule = BadTeacherUpdate(temperature=2.0, bn_mode="eval")
    rule.configure(network)
    by_role = {role: loaders[role][0] for role in ("forget", "remain")}
    joined = {key: torch.cat([by_role[role][key] for role in ("forget", "remain")]) for key in ("image", "label")}
    joined["is_forget"] = torch.arange(16) < 8
    losses = [rule.loss(network, batch, 0)[0].detach() for batch in (by_role, joined)]
    assert torch.equal(*losses)
    # in eval mode the student still is the original: remaining samples cost nothing
    none = rule.loss(network, joined | {"is_forget": torch.zeros(16, dtype=torch.bool)}, 0)[0]
    assert float(none.detach()) == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(ValueError, match="needs batches with 'is_forget'"):
        rule.loss(network, by_role["forget"], 0)


def test_boundary_shrink_can_leave_out_samples_that_stay(network, loaders):
    batch = loaders["forget"][0]
    stay = BoundaryShrinkUpdate(epsilon=1e-9, skip_failed=True, bn_mode="eval")
    stay.configure(network)
    own = stay.original(batch["image"]).argmax(1)
    loss, logs = stay.loss(network, batch | {"label": own}, 0)
    # rounding to 8 bits may move a prediction, nothing else does
    assert float(logs["boundary_crossed"]) < 0.5
    if not float(logs["boundary_crossed"]):
        assert float(loss.detach()) == 0
        with pytest.warns(UserWarning, match="no forget sample crossed a boundary"):
            stay.finish(network)
    far = BoundaryShrinkUpdate(epsilon=0.5)
    far.configure(network)
    moved, _ = far.neighbours(batch["image"], batch["label"])
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert float((moved * 255 - (moved * 255).round()).abs().max()) < 1e-9


def test_boundary_expand_never_widens_the_network_and_keeps_its_row(network, loaders):
    rule = BoundaryExpandUpdate(optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    rule.configure(network)
    for k, batch in enumerate(loaders["forget"] * 10):
        logs = rule.step(network, batch, k)
    assert float(logs["boundary_expanded"]) == 1.0
    assert network.fc.out_features == 4
    other = BoundaryExpandUpdate()
    other.configure(Tiny().double())
    other.load_state_dict(rule.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.row, rule.row, strict=True))
    assert not network.fc._forward_hooks
    with pytest.raises(RuntimeError, match="came before configure"):
        BoundaryExpandUpdate().loss(network, loaders["forget"][0], 0)


@pytest.mark.parametrize(("count", "images"), [("batch", 20), ("as_coded", 1)])
def test_unsir_shows_its_noise_evenly_and_in_the_impair_pass_only(network, loaders, count, images):
    rule = UNSIRUpdate(noise_batch=20, noise_count=count, repeats=3, noise_steps=5, impair_epochs=1, repair_epochs=2)
    logs = run(rule, network, loaders)
    assert rule.noise.shape == (images, 1, 6, 6)
    assert rule.noise_labels.tolist() == [0] * images
    shown = [rule.noise_of_step(within) for within in range(4)]
    assert sum(len(noise) for noise, _, _ in shown) == sum(total for _, _, total in shown) == 3 * images
    assert max(total for _, _, total in shown) - min(total for _, _, total in shown) <= 1
    assert rule.steps == len(logs) == 12
    assert sum("noise_loss" in log for log in logs) == sum(total > 0 for _, _, total in shown)
    assert all("noise_loss" not in log for log in logs[4:])
    assert rule.reads == {"forget", "remain"}


def test_unsir_noise_is_what_the_network_is_worst_at(network, loaders):
    losses = []
    for steps in (0, 40):
        rule = UNSIRUpdate(noise_batch=16, noise_steps=steps, penalty=0.0)
        rule.configure(network)
        losses.append(rule.prepare(network, loaders)["noise_loss/0"])
    assert losses[1] > losses[0] + 0.2
    state = rule.state_dict()
    other = UNSIRUpdate()
    other.configure(network)
    other.load_state_dict(state)
    assert torch.equal(other.noise, rule.noise)


def test_unsir_refuses_parts_of_classes(network, loaders):
    with pytest.raises(ValueError, match="UNSIR forgets whole classes, but class 1 has samples in"):
        run(UNSIRUpdate(), network, loaders | {"forget": loaders["remain"][:1]})


@pytest.mark.parametrize(
    ("rule", "role"),
    [
        (lambda: SCRUBUpdate(bn_mode="eval"), None),
        (lambda: UNSIRUpdate(bn_mode="eval", noise_steps=1), None),
        (lambda: BoundaryShrinkUpdate(bn_mode="eval"), "forget"),
        (lambda: BoundaryExpandUpdate(bn_mode="eval"), "forget"),
    ],
    ids=["scrub", "unsir", "shrink", "expand"],
)
def test_bn_mode_eval_leaves_the_statistics_alone(rule, role, network, loaders):
    before = {name: b.clone() for name, b in network.named_buffers()}
    rule = rule()
    if role is None:
        run(rule, network, loaders)
    else:
        rule.configure(network)
        rule.step(network, loaders[role][0], 0)
    assert_same_bits(before, dict(network.named_buffers()))
    assert network.bn1.training


def test_scrub_keeps_forget_batches_out_of_the_statistics(network, loaders):
    rule = SCRUBUpdate(bn_mode="remain")
    before = network.bn1.running_mean.clone()
    run(rule, network, loaders, steps=2)
    assert torch.equal(network.bn1.running_mean, before)
    run(rule, network, loaders, steps=3)
    assert not torch.equal(network.bn1.running_mean, before)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SCRUBUpdate(epochs=0), "epochs is 0, it must be at least 1"),
        (lambda: SCRUBUpdate(epochs=2, msteps=3), "msteps is 3, it must lie in 0…2"),
        (lambda: SCRUBUpdate(gamma=-1.0), "gamma is -1.0"),
        (lambda: SCRUBUpdate(temperature=0.0), "temperature is 0.0, it must be above 0"),
        (lambda: SCRUBUpdate(lr_schedule="x"), "lr_schedule is 'x', allowed are constant, cosine and milestones"),
        (lambda: SCRUBUpdate(milestones=[3]), "milestones is .3., but lr_schedule is 'constant'"),
        (lambda: SCRUBUpdate(bn_mode="x"), "bn_mode is 'x'"),
        (lambda: BadTeacherUpdate(temperature=-1.0), "temperature is -1.0"),
        (lambda: BadTeacherUpdate(remain_share=0.0), "remain_share is 0.0, it must lie in"),
        (lambda: BadTeacherUpdate(bn_mode="remain"), "bn_mode is 'remain', allowed are train and eval"),
        (lambda: BoundaryShrinkUpdate(epsilon=0.0), "epsilon is 0.0"),
        (lambda: UNSIRUpdate(impair_epochs=0), "impair_epochs is 0"),
        (lambda: UNSIRUpdate(noise_steps=-1), "noise_steps is -1"),
        (lambda: UNSIRUpdate(noise_lr=0.0), "noise_lr is 0.0"),
        (lambda: UNSIRUpdate(noise_count="x"), "noise_count is 'x'"),
        (lambda: UNSIRUpdate(bn_mode="x"), "bn_mode is 'x'"),
    ],
)
def test_wrong_arguments_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
