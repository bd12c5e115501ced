import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from torchlethe.functional.membership import (
    best_threshold,
    class_thresholds,
    fit_logistic,
    fraction,
    indiscernibility,
    logistic_membership,
    threshold_membership,
)
from torchlethe.functional.uncertainty import confidence, entropy, modified_entropy, modified_entropy_as_published


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


def draw(members, non_members, gap, scale=1.0, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(members, dtype=torch.float64, generator=generator)
    outside = torch.randn(non_members, dtype=torch.float64, generator=generator) + gap
    scores = torch.cat([inside, outside]) * scale + shift
    return scores, torch.arange(members + non_members) < members


def test_logistic_fraction_agrees_with_the_official_code(golden):
    sets = [entropy(golden[f"logits_{name}"]) for name in ("retain", "test", "forget")]
    assert logistic_membership(*sets) == golden["lr_mia_entropy.member_fraction"].item()
    published = [
        modified_entropy_as_published(golden[f"logits_{n}"], golden[f"y_{n}"]) for n in ("retain", "test", "forget")
    ]
    assert logistic_membership(*published) == golden["lr_mia_m_entropy_as_coded.member_fraction"].item()


def test_logistic_coefficients_are_twice_the_multinomial_ones(golden):
    scores = torch.cat([entropy(golden["logits_retain"]), entropy(golden["logits_test"])])
    fit = fit_logistic(scores, torch.arange(500) < 300)
    # the official fit stopped at lbfgs' tolerance
    assert fit.coefficient / 2 == pytest.approx(golden["lr_mia_entropy.coef"].item(), abs=1e-5)
    assert fit.intercept / 2 == pytest.approx(golden["lr_mia_entropy.intercept"].item(), abs=1e-5)


@pytest.mark.parametrize("C", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        {"members": 60, "non_members": 20, "gap": 1.0},
        {"members": 30, "non_members": 90, "gap": 0.0},
        {"members": 40, "non_members": 40, "gap": 30.0},  # separable
        {"members": 50, "non_members": 20, "gap": 2.0, "scale": 1e-3, "shift": 5.0},
        {"members": 50, "non_members": 20, "gap": 2.0, "scale": 300.0},
    ],
)
def test_newton_finds_scikit_learns_optimum(data, C, balanced):
    scores, is_member = draw(**data)
    fit = fit_logistic(scores, is_member, C=C, balanced=balanced)
    model = LogisticRegression(
        C=C, class_weight="balanced" if balanced else None, tol=1e-12, max_iter=10000, solver="newton-cholesky"
    )
    model.fit(scores[:, None].numpy(), is_member.numpy())
    assert fit.coefficient == pytest.approx(model.coef_[0, 0], rel=1e-5, abs=1e-8)
    assert fit.intercept == pytest.approx(model.intercept_[0], rel=1e-5, abs=1e-5)
    assert fit.iterations < 30


def test_constant_scores_decide_nothing():
    fit = fit_logistic(torch.full((6,), 0.3), torch.tensor([True] * 4 + [False] * 2))
    assert not fit.predict(torch.tensor([0.0, 0.3, 1.0])).any()


def test_logistic_membership_does_not_depend_on_order():
    scores, is_member = draw(50, 70, 0.7)
    targets = torch.linspace(-2, 2, 41)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    shuffled, flags = scores[order], is_member[order]
    first = logistic_membership(scores[is_member], scores[~is_member], targets)
    assert first == logistic_membership(shuffled[flags], shuffled[~flags], targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.ones(2), torch.tensor([float("nan")])), "targets contain NaN"),
        ((torch.zeros(0), torch.ones(2), torch.zeros(1)), "members must be a non-empty"),
        ((torch.zeros(2), torch.ones(2, 2), torch.zeros(1)), "non_members must be"),
    ],
)
def test_unusable_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        logistic_membership(*arguments)


def test_fit_refuses_one_class_and_odd_strength():
    with pytest.raises(ValueError, match="got 3 members among 3"):
        fit_logistic(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="C is 0, it must be above 0"):
        fit_logistic(torch.zeros(2), torch.tensor([True, False]), C=0)


def loop_threshold(members, non_members):
    """The published O(n²) search."""
    best, chosen = 0.0, 0.0
    for value in torch.cat([members, non_members]).tolist():
        balanced = 0.5 * ((members >= value).double().mean().item() + (non_members < value).double().mean().item())
        if balanced > best:
            best, chosen = balanced, value
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_sorted_search_equals_the_published_loop_also_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    members = (torch.rand(37, generator=generator, dtype=torch.float64) * 10).round() / 10
    non_members = (torch.rand(23, generator=generator, dtype=torch.float64) * 10).round() / 10
    assert best_threshold(members, non_members) == loop_threshold(members, non_members)


@pytest.mark.parametrize("feature", ["confidence", "entropy", "m_entropy"])
def test_threshold_attack_agrees_with_the_official_code(golden, feature):
    score = {
        "confidence": confidence,
        "entropy": lambda logits, labels: -entropy(logits),
        "m_entropy": lambda logits, labels: -modified_entropy(logits, labels),
    }[feature]
    scores = {name: score(golden[f"logits_{name}"], golden[f"y_{name}"]) for name in ("retain", "test", "forget")}
    labels = {name: golden[f"y_{name}"] for name in scores}
    thresholds = class_thresholds(scores["retain"][:150], labels["retain"][:150], scores["test"], labels["test"], 10)
    members = fraction(threshold_membership(scores["retain"][150:], labels["retain"][150:], thresholds))
    others = 1 - fraction(threshold_membership(scores["forget"], labels["forget"], thresholds))
    assert [members, others] == pytest.approx(golden[f"threshold_attack.{feature}"].tolist(), abs=1e-12)


def test_a_class_without_members_gets_the_common_threshold():
    members, non_members = torch.tensor([4.0, 3.0]), torch.tensor([1.0, 4.5])
    thresholds = class_thresholds(members, torch.tensor([0, 0]), non_members, torch.tensor([0, 1]), 2)
    assert thresholds.tolist() == [3.0, best_threshold(members, non_members)] == [3.0, 3.0]


def test_indiscernibility_is_one_for_guessing():
    assert [indiscernibility(a) for a in (0.5, 0.0, 1.0)] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"attack_accuracy is 1\.5, it must lie in \[0, 1\]"):
        indiscernibility(1.5)
