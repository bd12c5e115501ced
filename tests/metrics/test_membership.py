import numpy as np
import pytest
import torch

from torchlethe.functional.uncertainty import sample_loss
from torchlethe.metrics import (
    BadTeacherMembership,
    MembershipLogistic,
    MembershipSVC,
    MembershipThreshold,
    SimpleMembership,
    simple_membership,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


ROLES = (("member", "retain"), ("non_member", "test"), ("forget", "forget"))


def feed(metric, golden, batch=64, padded=True, roles=ROLES):
    """Update in batches, each with a padding row as a distributed sampler would add."""
    for role, name in roles:
        logits, labels = golden[f"logits_{name}"], golden[f"y_{name}"]
        for rows in torch.arange(len(labels)).split(batch):
            part, part_labels, index = logits[rows], labels[rows], rows
            if padded:
                part, part_labels = torch.cat([part, part[:1]]), torch.cat([part_labels, torch.tensor([-100])])
                index = torch.cat([rows, torch.tensor([-1])])
            metric.update(part, part_labels, role=role, index=index)
    return metric


def test_logistic_agrees_with_the_official_code(golden):
    assert feed(MembershipLogistic(), golden).compute() == golden["lr_mia_entropy.member_fraction"]
    published = MembershipLogistic("m_entropy", m_entropy="as_published")
    assert feed(published, golden).compute() == golden["lr_mia_m_entropy_as_coded.member_fraction"]


@pytest.mark.parametrize("mode", ["exact", "auto"])
@pytest.mark.parametrize("feature", ["correctness", "confidence", "entropy", "m_entropy", "probabilities"])
def test_svc_agrees_with_the_official_code(golden, feature, mode):
    metric = feed(MembershipSVC(feature, m_entropy="as_published", mode=mode, selection="first"), golden)
    name = "prob" if feature == "probabilities" else feature
    assert metric.compute().item() == golden[f"svc_mia_forget_efficacy.{name}"].item()


def test_bad_teacher_agrees_with_the_official_code(golden):
    assert feed(BadTeacherMembership(), golden).compute() == golden["svc_mia_entropy_badteacher.member_fraction"]


def test_simple_attack_agrees_with_the_official_code(golden):
    roles = (("non_member", "test"), ("forget", "forget"))
    found = feed(SimpleMembership(selection="first"), golden, roles=roles).compute()
    assert found["accuracy"].item() == pytest.approx(golden["simple_mia.mean"].item(), abs=1e-15)
    assert found["indiscernibility"].item() == pytest.approx(1 - abs(0.4375 - 0.5) / 0.5)
    losses = [sample_loss(golden[f"logits_{name}"], golden[f"y_{name}"]) for name in ("forget", "test")]
    scores = simple_membership(*losses, seed=123, selection="first")
    assert list(scores) == pytest.approx(golden["simple_mia.scores"].tolist(), abs=1e-15)


@pytest.mark.parametrize("feature", ["confidence", "entropy", "m_entropy", "correctness"])
def test_threshold_agrees_with_the_official_code(golden, feature):
    shadow = golden | {"logits_retain": golden["logits_retain"][:150], "y_retain": golden["y_retain"][:150]}
    found = feed(MembershipThreshold(feature), shadow).compute().item()
    rejected = golden[f"threshold_attack.{feature}"][1].item()  # of the forget set as non-members
    assert 1 - found == pytest.approx(rejected, abs=1e-12)


def test_batches_order_and_repeated_samples_do_not_matter_with_an_index(golden):
    one = feed(MembershipSVC(seed=5), golden, batch=1000, padded=False).compute()
    many = MembershipSVC(seed=5)
    for role, name in ROLES:
        rows = torch.randperm(len(golden[f"y_{name}"]), generator=torch.Generator().manual_seed(1))
        for part in (*rows.split(33), rows[:5]):
            many.update(golden[f"logits_{name}"][part], golden[f"y_{name}"][part], role, index=part)
    assert many.compute() == one


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_starts_anew(golden):
    metric = feed(MembershipLogistic(), golden)
    first = metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="no batch with role='member'"):
        metric.compute()
    assert feed(metric, golden).compute() == first


def test_single_precision_logits_are_computed_on_in_double(golden):
    single = {name: a.float() if name.startswith("logits") else a for name, a in golden.items()}
    assert feed(MembershipLogistic(), single).compute() == golden["lr_mia_entropy.member_fraction"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MembershipLogistic("probabilities"), "feature is 'probabilities', allowed are "),
        (lambda: MembershipSVC("confidence", m_entropy="as_coded"), "m_entropy is 'as_coded', allowed are "),
        (lambda: MembershipSVC("probabilities", mode="fast"), "mode='fast' merges scalar features only"),
        (lambda: MembershipSVC(selection="random"), "selection is 'random', allowed are "),
        (
            lambda: MembershipLogistic().update(torch.zeros(1, 2), torch.zeros(1).long(), "remain"),
            "role is 'remain', allowed are ",
        ),
        (
            lambda: MembershipLogistic().update(torch.zeros(1, 2), torch.zeros(1).long(), "forget", torch.zeros(2)),
            "index must have the shape",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_only_padding_is_an_empty_set():
    metric = MembershipLogistic()
    for role in metric.roles:
        metric.update(torch.zeros(1, 2), torch.tensor([-100]), role)
    with pytest.raises(ValueError, match="only padding"):
        metric.compute()
