"""The methods with teachers agree with the official code on every array of the golden file."""

import math

import numpy as np
import pytest
import torch

from tests.golden_networks import Tiny, fixed_batches, tensors_under
from torchlethe.functional.distillation import bad_teacher_loss
from torchlethe.updates import BoundaryExpandUpdate, BoundaryShrinkUpdate, SCRUBUpdate


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "mu_baselines.npz") as file:
        return dict(file)


@pytest.fixture
def network(golden):
    network = Tiny().double()
    assert not network.load_state_dict(tensors_under(golden, "init."), strict=False).unexpected_keys
    return network.train()


@pytest.fixture(scope="module")
def loaders(golden):
    x = {name: torch.from_numpy(golden[name]) for name in ("x_forget", "y_forget", "x_retain", "y_retain")}
    return {
        "forget": fixed_batches(x["x_forget"], x["y_forget"], 8),
        "remain": fixed_batches(x["x_retain"], x["y_retain"], 8),
    }


def assert_golden(state, golden, prefix):
    expected = tensors_under(golden, prefix)
    assert len(expected) > 5
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_scrub_ends_every_epoch_in_the_official_state(golden, network, loaders):
    rule = SCRUBUpdate(
        epochs=3,
        msteps=2,
        gamma=0.99,
        alpha=float(golden["hp_scrub_alpha"]),
        temperature=float(golden["hp_T"]),
        optimizer=sgd(float(golden["hp_scrub_lr"])),
        lr_schedule="cosine",
    )
    rule.configure(network)
    passes = {role: len(batches) for role, batches in loaders.items()}
    rule.set_passes(passes)
    assert rule.steps == 2 * 3 + 3 * 6
    ends = []
    for k, draws in enumerate(rule.feed.plan(passes)):
        ((role, draw),) = draws.items()
        epoch, expected_role, last = rule.place(k)
        assert role == expected_role
        rule.step(network, {role: loaders[role][draw % passes[role]]}, k)
        if last:
            ends.append(epoch)
            assert_golden(network.state_dict(), golden, f"scrub_ep{epoch + 1}.")
    assert ends == [0, 1, 2]
    assert k + 1 == rule.steps


def test_bad_teacher_loss_and_gradient(golden):
    names = ("bt_student_logits", "bt_full_teacher_logits", "bt_bad_teacher_logits", "bt_is_forget")
    student, full, bad, flags = (torch.from_numpy(golden[name]) for name in names)
    student.requires_grad_()
    loss = bad_teacher_loss(student, full, bad, flags, float(golden["bt_T"]))
    assert float(loss) == pytest.approx(float(golden["bt_loss"]), abs=1e-15)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.from_numpy(golden["bt_grad_student"]), rtol=0, atol=1e-15)
    # K times smaller than the mean over samples
    logs, target = (student / 2).log_softmax(1), (torch.where(flags.bool()[:, None], bad, full) / 2).softmax(1)
    batchmean = torch.nn.functional.kl_div(logs, target, reduction="batchmean")
    assert float(batchmean) == pytest.approx(4 * float(loss), rel=1e-14)


def test_boundary_shrink(golden, network, loaders):
    rule = BoundaryShrinkUpdate(sgd(float(golden["lr"])))
    rule.configure(network)
    found = [rule.neighbours(batch["image"], batch["label"]) for batch in loaders["forget"]]
    torch.testing.assert_close(found[0][0], torch.from_numpy(golden["bs_x_adv_first_batch"]), rtol=0, atol=1e-15)
    assert torch.equal(torch.cat([labels for _, labels in found]), torch.from_numpy(golden["bs_adv_labels"]))
    for k, batch in enumerate(loaders["forget"]):
        logs = rule.step(network, batch, k)
    assert 0 < float(logs["boundary_crossed"]) <= 1
    assert_golden(network.state_dict(), golden, "boundary_shrink_1ep.")


def test_boundary_expand_with_the_extra_row_beside_the_network(golden, network, loaders):
    rule = BoundaryExpandUpdate(sgd(float(golden["lr"])))
    rule.configure(network)
    assert float(rule.row[0].detach().abs().max()) < 1 / math.sqrt(6)
    with torch.no_grad():
        rule.row[0].copy_(torch.from_numpy(golden["be_fc_weight_init"][-1:]))
        rule.row[1].copy_(torch.from_numpy(golden["be_fc_bias_init"][-1:])[None])
    for k, batch in enumerate(loaders["forget"]):
        rule.step(network, batch, k)
        assert network.fc.weight.shape == (4, 6)
    state = dict(network.state_dict())
    state["fc.weight"] = torch.cat([state["fc.weight"], rule.row[0].detach()])
    state["fc.bias"] = torch.cat([state["fc.bias"], rule.row[1].detach()[0]])
    assert_golden(state, golden, "boundary_expand_1ep.")
