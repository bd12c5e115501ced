"""SCAR's definitions on cases small enough to write down."""

import pytest
import torch

from torchlethe.functional import scar


def test_tukey_is_a_root_with_a_gradient_everywhere():
    x = torch.tensor([[4.0, 0.0, 0.25, -9.0]], requires_grad=True)
    y = scar.tukey(x)
    torch.testing.assert_close(y, torch.tensor([[2.0, 0.0, 0.5, -3.0]]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.25, 0.0, 1.0, 1 / 6]]))
    torch.testing.assert_close(scar.tukey(x.detach(), 1.0), x.detach())


def test_class_statistics_are_those_of_each_class():
    torch.manual_seed(0)
    features, labels = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    counts, sums = scar.class_sums(features, labels, 4)
    assert counts.tolist() == [10, 10, 10, 0]
    means = sums / counts.clamp_min(1)[:, None]
    scatter = scar.class_scatter(features, labels, means)
    for k in range(3):
        torch.testing.assert_close(means[k], features[labels == k].mean(0))
        torch.testing.assert_close(scatter[k] / 9, torch.cov(features[labels == k].T))
    assert not scatter[3].any()


def test_shrinkage_twice_then_correlation_then_pseudo_inverse():
    covariance = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    # mean variance 3, mean covariance 1: 2 + 9, 1 + 3; then mean variance 12, mean covariance 4
    once = scar.shrunk_covariance(covariance)
    torch.testing.assert_close(once, torch.tensor([[11.0, 4.0], [4.0, 13.0]], dtype=torch.float64))
    twice = scar.shrunk_covariance(once)
    torch.testing.assert_close(twice, torch.tensor([[47.0, 16.0], [16.0, 49.0]], dtype=torch.float64))
    r = 16 / (47 * 49) ** 0.5
    torch.testing.assert_close(scar.correlation(twice), torch.tensor([[1, r], [r, 1]], dtype=torch.float64))
    inverse = torch.tensor([[1, -r], [-r, 1]], dtype=torch.float64) / (1 - r * r)
    torch.testing.assert_close(scar.inverse_correlation(covariance), inverse)
    # class by class, in a batch
    torch.testing.assert_close(scar.inverse_correlation(torch.stack([covariance, twice]))[0], inverse)


def test_a_singular_correlation_has_a_pseudo_inverse_and_a_constant_feature_does_no_harm():
    singular = torch.ones(3, 3, dtype=torch.float64)
    pseudo = scar.inverse_correlation(singular, 0.0, 0.0)
    torch.testing.assert_close(pseudo, torch.full((3, 3), 1 / 9, dtype=torch.float64))
    constant = torch.diag(torch.tensor([1.0, 0.0]))
    assert scar.correlation(constant).tolist() == [[1, 0], [0, 0]]
    assert torch.isfinite(scar.inverse_correlation(torch.zeros(2, 2))).all()


def test_mahalanobis_form_of_directions():
    features, means = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    inverses = torch.stack([torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])])
    found = scar.mahalanobis_form(features, means, inverses)
    # (0.6, 0.8) − (1, 0) = (−0.4, 0.8); − (0, 1) = (0.6, −0.2); (0, 1) − (1, 0) = (−1, 1)
    expected = torch.tensor([[0.16 + 0.64, 2 * 0.36 - 2 * 0.12 + 3 * 0.04], [2.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_nearest_class_is_another_one_with_statistics():
    distances = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    known = torch.tensor([True, False, True, True])
    assert scar.nearest_other_class(distances, torch.tensor([0, 3]), known).tolist() == [2, 0]


def test_divergence_keeps_the_outputs_without_the_classes_that_go():
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    teacher[0, 2] = 9.0  # taken for the class that goes
    gone = torch.tensor([False, False, True, False])
    losses, counts = scar.surrogate_divergence(student, teacher, gone)
    assert counts.tolist() == (teacher.argmax(1) != 2).tolist()
    assert losses[0] == 0
    target = teacher.clone()
    target[:, 2] = teacher.min(1).values
    p, q = target.softmax(1), student.log_softmax(1)
    torch.testing.assert_close(losses, ((p.log() - q) * p).sum(1) * counts)
    nothing, everything = scar.surrogate_divergence(teacher, teacher, torch.zeros(4, dtype=torch.bool), 2.0)
    assert everything.all()
    assert nothing.abs().max() == pytest.approx(0, abs=1e-12)
