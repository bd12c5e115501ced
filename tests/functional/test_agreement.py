import math

import numpy as np
import pytest
import torch

from torchlethe.functional.agreement import correctness_agreement, prediction_agreement, score_correlation
from torchlethe.functional.over_forgetting import class_accuracy, class_drops, class_hits, over_forgetting
from torchlethe.functional.relearning import anamnesis_index, has_relearned, relearning_target


def some_answers(count=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(classes, (count,), generator=generator) for _ in range(3))


def test_a_model_agrees_with_itself():
    predictions, _, labels = some_answers()
    assert prediction_agreement(predictions, predictions).all()
    assert correctness_agreement(predictions, predictions, labels).all()
    assert score_correlation(predictions.double(), predictions.double()) == pytest.approx(1.0, abs=1e-12)


def test_agreement_is_symmetric_ignores_order_and_is_bounded_by_the_accuracies():
    ours, theirs, labels = some_answers()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for function, arguments in ((prediction_agreement, ()), (correctness_agreement, (labels,))):
        share = function(ours, theirs, *arguments).double().mean()
        assert share == function(theirs, ours, *arguments).double().mean()
        assert share == function(ours[order], theirs[order], *(a[order] for a in arguments)).double().mean()
    # the same prediction implies the same correctness, and a difference in accuracy implies disagreement
    same = correctness_agreement(ours, theirs, labels)
    assert same[prediction_agreement(ours, theirs)].all()
    gap = abs(float((ours == labels).double().mean() - (theirs == labels).double().mean()))
    assert 1 - float(same.double().mean()) >= gap - 1e-12


def test_correlation_agrees_with_numpy_and_knows_its_limits():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(300, generator=generator), torch.rand(300, generator=generator)
    assert score_correlation(a, a + b) == pytest.approx(np.corrcoef(a.double(), (a + b).double())[0, 1], abs=1e-12)
    assert score_correlation(a, 3.0 - 2.0 * a) == pytest.approx(-1.0, abs=1e-6)
    for constant in (torch.ones(300), torch.full((300,), 1 / 3)):
        assert math.isnan(score_correlation(a, constant))
    assert math.isnan(score_correlation(a[:1], b[:1]))
    assert math.isnan(score_correlation(a.index_fill(0, torch.tensor(3), math.nan), b))


def test_class_accuracy_counts_each_class_and_drops_padding():
    logits = torch.eye(4)[torch.tensor([0, 1, 1, 0, 3])]
    labels = torch.tensor([0, 1, 0, 0, -100])
    hits, counts = class_hits(logits, labels)
    assert hits.tolist() == [2, 1, 0, 0]
    assert counts.tolist() == [3, 1, 0, 0]
    accuracy = class_accuracy(logits, labels)
    assert accuracy[:2].tolist() == pytest.approx([200 / 3, 100.0])
    assert accuracy[2:].isnan().all()


def test_drops_count_losses_only_and_leave_classes_out():
    own = torch.tensor([50.0, 90.0, 70.0, math.nan, 0.0])
    retrain = torch.tensor([60.0, 80.0, 100.0, math.nan, 100.0])
    assert class_drops(own, own) == (0.0, 0.0, -1)
    assert class_drops(own, retrain) == (35.0, 100.0, 4)
    kept = torch.tensor([True, True, True, True, False])
    found = class_drops(own, retrain, kept)
    assert found.mean == pytest.approx((10 + 0 + 30) / 3)
    assert (found.worst, found.worst_class) == (30.0, 2)
    assert math.isnan(class_drops(own, retrain, torch.zeros(5, dtype=torch.bool)).mean)
    with pytest.raises(ValueError, match="one value for each class"):
        class_drops(own, retrain[:3])


def test_over_forgetting_is_one_sided():
    assert over_forgetting(70.0, 77.0) == 7.0
    assert over_forgetting(90.0, 77.0) == 0.0


def test_relearning_levels():
    assert has_relearned(93.0, relearning_target(98.0, 5.0))
    assert not has_relearned(92.9, relearning_target(98.0, 5.0))
    assert has_relearned(0.3, relearning_target(0.2, 0.1, "loss"), "loss")
    assert not has_relearned(0.4, relearning_target(0.2, 0.1, "loss"), "loss")
    assert not has_relearned(math.nan, 0.0)
    assert not has_relearned(math.nan, 0.0, "loss")
    with pytest.raises(ValueError, match="margin is -1, it must be at least 0"):
        relearning_target(98.0, -1)
    assert anamnesis_index(10, 20) == 0.5
    assert math.isnan(anamnesis_index(10, 0))
    with pytest.raises(ValueError, match="steps is -1, it must be at least 0"):
        anamnesis_index(-1, 3)


@pytest.mark.parametrize("function", [prediction_agreement, score_correlation])
def test_other_samples_are_refused(function):
    with pytest.raises(ValueError, match="one value for each sample"):
        function(torch.zeros(3), torch.zeros(4))
