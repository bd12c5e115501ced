import math

import numpy as np
import pytest
import torch

from torchlethe.metrics import (
    METRIC_DEFINITIONS,
    BadTeacherMembership,
    MembershipLogistic,
    MembershipSVC,
    MembershipThreshold,
    define_metric,
)
from torchlethe.metrics.evaluation import DIVERGENCES, MEMBERSHIP, Outputs, divergence_metrics, unlearning_metrics


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


@pytest.fixture(scope="module")
def sets(golden):
    names = {"forget": "forget", "remain": "retain", "test": "test"}
    return {
        role: Outputs(golden[f"logits_{name}"], golden[f"y_{name}"], torch.arange(len(golden[f"y_{name}"])))
        for role, name in names.items()
    }


@pytest.fixture(scope="module")
def everything(sets):
    return unlearning_metrics(sets, membership=MEMBERSHIP, seed=123)


def test_numbers_agree_with_the_official_code_in_percent(golden, everything):
    expected = {
        "forget_accuracy": "acc_forget",
        "remain_accuracy": "acc_retain",
        "test_accuracy": "acc_test",
    }
    for ours, theirs in expected.items():
        assert everything[ours] == pytest.approx(golden[theirs].item(), abs=1e-9)
    fractions = {
        "mia_entropy_logistic": "lr_mia_entropy.member_fraction",
        "mia_m_entropy_as_published_logistic": "lr_mia_m_entropy_as_coded.member_fraction",
        "mia_entropy_svc_all": "svc_mia_entropy_badteacher.member_fraction",
    }
    for ours, theirs in fractions.items():
        assert everything[ours] == pytest.approx(100 * golden[theirs].item(), abs=1e-9)


def test_divergences_agree_with_the_official_code(golden, sets):
    reference = Outputs(golden["logits_forget_retrained"], sets["forget"].labels, sets["forget"].index)
    found = divergence_metrics(sets["forget"], reference, DIVERGENCES)
    expected = {
        "kl_to_reference": "kl_div_retrain_to_unlearn",
        "js_to_reference": "js_div",
        "activation_distance": "activation_distance",
        "wasserstein1_confidence": "wasserstein1_confidence",
        "wasserstein1_loss": "wasserstein1_loss",
    }
    for ours, theirs in expected.items():
        assert found[ours] == pytest.approx(golden[theirs].item(), abs=1e-12)
    assert set(found) == {*expected, "completeness"}


def test_every_number_has_a_definition(everything, sets):
    distances = divergence_metrics(sets["forget"], sets["forget"], DIVERGENCES)
    for name in (*everything, *distances, "average_gap", "tug_of_war", "run_seconds", "speed_up"):
        assert name in METRIC_DEFINITIONS
        found = define_metric(f"reference_{name}")
        assert found is not None
        assert found.definition.endswith(".")
        assert found.orientation in ("reference", "higher", "lower")
    assert define_metric("shadow_accuracy").unit == "%"
    assert define_metric("nonsense") is None


def test_attacks_lie_in_percent(everything):
    assert all(0 <= value <= 100 for value in everything.values())
    assert everything["mia_correctness_threshold"] == everything["forget_accuracy"]


@pytest.mark.parametrize("name", [name for name in MEMBERSHIP if name != "simple"])
def test_attacks_equal_their_torchmetrics(sets, everything, name):
    attack = next(a for a in ("svc_all", "logistic", "svc", "threshold") if name.endswith(f"_{a}"))
    feature = name.removesuffix(f"_{attack}")
    options = {"feature": feature.removesuffix("_as_published")}
    options["m_entropy"] = "as_published" if feature.endswith("_as_published") else "correct"
    if attack == "svc":
        options["seed"] = 123
    classes = {
        "logistic": MembershipLogistic,
        "svc": MembershipSVC,
        "svc_all": BadTeacherMembership,
        "threshold": MembershipThreshold,
    }
    metric = classes[attack](**options)
    for ours, role in (("remain", "member"), ("test", "non_member"), ("forget", "forget")):
        metric.update(sets[ours].logits, sets[ours].labels, role)
    assert 100.0 * metric.compute().item() == everything[f"mia_{name}"]


def test_a_diverged_model_has_accuracies_and_no_attacks(sets):
    broken = Outputs(torch.full_like(sets["forget"].logits, math.nan), sets["forget"].labels, sets["forget"].index)
    found = unlearning_metrics({**sets, "forget": broken}, membership=["confidence_svc", "simple"])
    assert math.isnan(found["mia_confidence_svc"])
    assert math.isnan(found["mia_simple_indiscernibility"])
    assert found["remain_accuracy"] > 99
    assert math.isnan(divergence_metrics(broken, sets["forget"])["kl_to_reference"])


def test_without_remaining_samples_only_accuracies_are_known(sets):
    assert set(unlearning_metrics({"forget": sets["forget"]})) == {"forget_accuracy"}


def test_other_samples_or_names_are_refused(sets):
    with pytest.raises(ValueError, match="other samples"):
        divergence_metrics(sets["forget"], sets["test"])
    with pytest.raises(ValueError, match="divergences contains 'tv'"):
        divergence_metrics(sets["forget"], sets["forget"], ["tv"])
    with pytest.raises(ValueError, match="membership contains 'lira', allowed are correctness_logistic"):
        unlearning_metrics(sets, membership=["lira"])
