import pytest
import torch

from torchlethe.metrics.support_vectors import choose_rows, simple_membership, svc_membership


def confidences(size, power, seed):
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(size, generator=generator, dtype=torch.float64) ** power


def test_merging_points_keeps_the_decision():
    sets = confidences(900, 6, 0), confidences(900, 3, 1), confidences(400, 5, 2)
    exact, fast = (svc_membership(*sets, mode=mode) for mode in ("exact", "fast"))
    assert 0.1 < exact < 0.95
    assert fast == pytest.approx(exact, abs=0.01)


def test_separated_sets_are_told_apart():
    members, non_members = torch.linspace(0.9, 1.0, 50), torch.linspace(0.0, 0.5, 50)
    assert svc_membership(members, non_members, torch.tensor([0.95, 0.97, 0.2, 0.3])) == 0.5


def test_vectors_of_features():
    generator = torch.Generator().manual_seed(0)
    members, non_members = torch.rand(30, 3, generator=generator) + 2, torch.rand(30, 3, generator=generator)
    assert svc_membership(members, non_members, members[:4]) == 1.0
    with pytest.raises(ValueError, match="equally many features, got 3, 3, 2"):
        svc_membership(members, non_members, members[:, :2])


def test_unusable_features_are_refused():
    good = torch.rand(4)
    with pytest.raises(ValueError, match="targets must be finite"):
        svc_membership(good, good, torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match="members must be finite features of at least one sample"):
        svc_membership(torch.zeros(0), good, good)


def test_chosen_rows_are_distinct_and_follow_the_seed():
    rows = choose_rows(100, 30, seed=4)
    assert len(rows.unique()) == 30
    assert torch.equal(rows, choose_rows(100, 30, seed=4))
    assert not torch.equal(rows, choose_rows(100, 30, seed=5))
    assert torch.equal(choose_rows(10, 30), torch.arange(10))


def test_simple_attack_guesses_on_equal_distributions_and_wins_on_different_ones():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(400, generator=generator), torch.rand(300, generator=generator)
    assert len(simple_membership(a, b, splits=7)) == 7
    assert abs(sum(simple_membership(a, b)) / 10 - 0.5) < 0.1
    assert sum(simple_membership(a + 5, b)) / 10 == 1.0
    with pytest.raises(ValueError, match="at least 10"):
        simple_membership(a[:5], b)
