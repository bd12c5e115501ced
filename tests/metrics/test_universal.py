"""Metrics of universal attacks: definitions, padding, any split into batches, and neural collapse of a simplex."""

import pytest
import torch

from torchlethe.metrics import DominanceRatio, FeatureGathering, FoolingRatio, NeuralCollapse, TargetSuccess
from torchlethe.metrics.attack import AttackMetrics, uap_classes


def simplex(classes=4, each=5):
    """Features at the corners of a simplex equiangular tight frame, their labels, and the corners."""
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    labels = torch.arange(classes).repeat(each)
    return corners[labels] + 0.3, labels, corners


def test_counts_ignore_padding():
    labels = torch.tensor([0, 1, 1, -100])
    fooling = FoolingRatio()
    fooling.update(torch.tensor([2, 1, 0, 3]), torch.tensor([0, 1, 1, 0]), labels)
    assert float(fooling.compute()) == pytest.approx(2 / 3)
    every, others = TargetSuccess(1), TargetSuccess(1, exclude_target=True)
    for metric in (every, others):
        metric.update(torch.tensor([1, 1, 0, 1]), labels)
    assert float(every.compute()) == pytest.approx(2 / 3)
    assert float(others.compute()) == 1.0
    dominance = DominanceRatio(5, ks=(1, 2, 5, 9))
    dominance.update(torch.tensor([4, 4, 2, 0]), labels)
    assert [round(float(value), 4) for value in dominance.compute().values()] == [0.6667, 1.0, 1.0, 1.0]
    gathering = FeatureGathering()
    clean = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    gathering.update(-clean, clean, torch.tensor([[0.0, 1.0]]), labels)
    found = {name: float(value) for name, value in gathering.compute().items()}
    assert found == {"cosine_to_clean": -1.0, "cosine_to_uap": 0.0}


def test_a_simplex_has_collapsed_and_noise_undoes_it():
    features, labels, corners = simplex()
    metric = NeuralCollapse(4)
    metric.head = 2.5 * corners
    metric.update(features, labels, labels)
    for name, value in metric.compute().items():
        assert abs(float(value)) < 1e-10, name
    noise = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = []
    for size in (0.01, 0.05, 0.2):
        metric.reset()
        metric.update(features + size * noise, labels)
        spread.append(float(metric.compute()["nc1"]))
    assert 0 < spread[0] < spread[1] < spread[2]


def test_neural_collapse_follows_its_definition_in_any_batches():
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(60, 6, generator=generator), torch.randint(5, (60,), generator=generator)
    labels[labels == 4] = 3
    labels[0] = 4  # a class with one sample
    whole, parts = NeuralCollapse(6), NeuralCollapse(6)
    whole.head = parts.head = torch.randn(6, 6, generator=generator)
    predictions = labels.roll(1)
    whole.update(features, labels, predictions)
    padded = torch.cat([labels[40:], torch.tensor([-100])])
    parts.update(features[:40], labels[:40], predictions[:40])
    parts.update(torch.cat([features[40:], features[:1]]), padded, torch.cat([predictions[40:], predictions[:1]]))
    found, again = whole.compute(), parts.compute()
    assert found.keys() == again.keys()
    for name in found:
        assert float(found[name]) == pytest.approx(float(again[name]), abs=1e-10)
    assert found["classes_skipped"] == 2
    kept = range(4)
    exact = features.double()
    means = torch.stack([exact[labels == c].mean(0) for c in kept])
    centred = means - means.mean(0)
    rows = [exact[labels == c] - means[c] for c in kept]
    within = torch.cat(rows).T @ torch.cat(rows) / sum(map(len, rows))
    between = centred.T @ centred / 4
    nc1 = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10)) / 4
    assert float(found["nc1"]) == pytest.approx(float(nc1), rel=1e-8)
    assert float(found["nc1_ratio"]) == pytest.approx(float(within.trace() / between.trace()), rel=1e-10)
    norms = centred.norm(dim=1)
    assert float(found["nc2_norm"]) == pytest.approx(float(norms.std(correction=0) / norms.mean()), rel=1e-10)
    cosines = [torch.cosine_similarity(centred[a], centred[b], 0) for a in kept for b in kept if a < b]
    assert float(found["nc2_angle"]) == pytest.approx(float(torch.stack([(c + 1 / 3).abs() for c in cosines]).mean()))
    nearest = torch.cdist(exact, means).argmin(1)
    assert float(found["nc4"]) == pytest.approx(float((nearest != predictions).double().mean()))


def test_too_few_classes_give_nan():
    metric = NeuralCollapse(3)
    metric.update(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    found = metric.compute()
    assert torch.isnan(found["nc1"])
    assert found["classes_skipped"] == 2


def test_one_bundle_and_the_class_of_the_perturbation():
    bundle = AttackMetrics(3, target=1, features=True, collapse=True)
    logits = torch.eye(3)[[0, 1, 1, 2]]
    features = torch.randn(4, 5)
    bundle.update(
        logits, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, -100]), features, features, torch.ones(1, 5)
    )
    found = bundle.compute()
    assert float(found["fooling_ratio"]) == pytest.approx(1 / 3)
    assert float(found["accuracy"]) == pytest.approx(2 / 3)
    assert float(found["target_success_others"]) == 0.5
    assert {"nc1_clean", "nc4_attacked_predicted", "cosine_to_uap", "dominance_3"} <= found.keys()
    classes = uap_classes(torch.tensor([[0.0, 2.0, 1.0]]), bundle.histogram())
    assert {name: float(value) for name, value in classes.items()} == {
        "uap_class": 1.0,
        "uap_in_top_1": 1.0,
        "uap_in_top_3": 1.0,
        "uap_in_top_5": 1.0,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetSuccess(-1), "target is -1"),
        (lambda: DominanceRatio(1), "num_classes is 1"),
        (lambda: NeuralCollapse(1), "num_classes is 1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
