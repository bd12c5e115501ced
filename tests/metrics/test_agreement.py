import math

import numpy as np
import pytest
import torch

from torchlethe.functional import class_accuracy, class_drops, correctness_agreement, score_correlation
from torchlethe.functional.uncertainty import confidence
from torchlethe.metrics import ConfidenceCorrelation, CorrectnessAgreement, OverForgetting
from torchlethe.metrics.comparison import agreement_metrics, answers, class_accuracies, over_forgetting_metrics
from torchlethe.metrics.evaluation import Outputs


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


@pytest.fixture(scope="module")
def triple(golden):
    return golden["logits_forget"], golden["logits_forget_retrained"], golden["y_forget"]


def make(kind):
    return {
        "correctness": CorrectnessAgreement,
        "correlation": ConfidenceCorrelation,
        "classes": lambda: OverForgetting(10),
    }[kind]()


def plain(metric):
    found = metric.compute()
    return found if isinstance(found, dict) else {"value": found}


def feed(metric, triple, batch=7):
    for start in range(0, len(triple[2]), batch):
        metric.update(*(side[start : start + batch] for side in triple))
    return metric


def test_metrics_are_the_functions(triple):
    logits, retrained, labels = triple
    same = correctness_agreement(logits.argmax(1), retrained.argmax(1), labels)
    found = feed(CorrectnessAgreement(), triple).compute().item()
    assert found == pytest.approx(100 * same.double().mean().item())
    correlation = score_correlation(confidence(logits, labels), confidence(retrained, labels))
    assert feed(ConfidenceCorrelation(), triple).compute().item() == pytest.approx(correlation, abs=1e-12)
    drops = class_drops(class_accuracy(logits, labels), class_accuracy(retrained, labels))
    found = feed(OverForgetting(10), triple).compute()
    assert found["class_drop"].item() == pytest.approx(drops.mean)
    assert found["worst_class_drop"].item() == pytest.approx(drops.worst)


@pytest.mark.parametrize("kind", ["correctness", "correlation", "classes"])
def test_batches_padding_and_order_do_not_matter(triple, kind):
    expected = plain(feed(make(kind), triple, batch=1000))
    order = torch.randperm(len(triple[2]), generator=torch.Generator().manual_seed(3))
    shuffled = tuple(side[order] for side in triple)
    padded = [torch.cat([side, side[:5]]) for side in shuffled]
    padded[2][-5:] = -100
    for found in (plain(feed(make(kind), shuffled, 3)), plain(feed(make(kind), padded, 11))):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["correctness", "correlation", "classes"])
def test_two_shares_joined_are_the_whole(triple, kind):
    """What torchmetrics does across ranks: states are added, or stacked and merged by compute."""
    whole = plain(feed(make(kind), triple))
    first, second = (feed(make(kind), tuple(side[rank::2] for side in triple)) for rank in range(2))
    for name, reduce in first._reductions.items():
        both = torch.stack([getattr(first, name), getattr(second, name)])
        setattr(first, name, both if reduce is None else reduce(both))
    first._computed = None
    for name, value in plain(first).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-12)


def test_a_model_beside_itself(triple):
    logits, _, labels = triple
    alone = (logits, logits, labels)
    assert feed(CorrectnessAgreement(), alone).compute() == 100
    assert feed(ConfidenceCorrelation(), alone).compute().item() == pytest.approx(1.0, abs=1e-12)
    assert feed(OverForgetting(10), alone).compute() == {"class_drop": 0, "worst_class_drop": 0}


def test_forgotten_classes_do_not_count(triple):
    logits, retrained, labels = triple
    worse = retrained, logits, labels  # the retrained one is less accurate on the forget set
    everything = feed(OverForgetting(10), worse).compute()
    worst = int((class_accuracy(logits, labels) - class_accuracy(retrained, labels)).nan_to_num(-1).argmax())
    rest = feed(OverForgetting(10, forgotten=[worst]), worse).compute()
    assert 0 < rest["class_drop"] < everything["class_drop"]
    assert rest["worst_class_drop"] <= everything["worst_class_drop"]
    with pytest.raises(ValueError, match="forgotten contains 10"):
        OverForgetting(10, forgotten=[10])
    with pytest.raises(ValueError, match="must have 10 columns"):
        OverForgetting(10).update(torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(2, dtype=torch.long))


def outputs(logits, labels):
    return Outputs(logits, labels, torch.arange(len(labels)))


def test_summaries_compare_like_logits(golden, triple):
    logits, retrained, labels = triple
    own = {"forget": outputs(logits, labels), "remain": outputs(golden["logits_retain"], golden["y_retain"])}
    other = {"forget": outputs(retrained, labels), "remain": own["remain"]}
    found = agreement_metrics(
        {name: part.labels for name, part in own.items()},
        {name: answers(part) for name, part in own.items()},
        {name: answers(part) for name, part in other.items()},
    )
    agree = logits.argmax(1) == retrained.argmax(1)
    assert found["agreement_forget"] == pytest.approx(100 * agree.double().mean().item())
    assert found["agreement_remain"] == found["correctness_agreement_remain"] == 100
    assert -1 <= found["confidence_correlation"] <= 1
    assert "agreement_test" not in found  # nobody has it
    shifted = {"forget": answers(Outputs(retrained, labels, torch.arange(len(labels)) + 1))}
    assert agreement_metrics({"forget": labels}, {"forget": answers(own["forget"])}, shifted) == {}
    broken = answers(outputs(logits * math.nan, labels))
    found = agreement_metrics({"forget": labels}, {"forget": broken}, {"forget": answers(other["forget"])})
    assert all(math.isnan(value) for value in found.values())


def test_a_class_without_remaining_samples_does_not_count_as_lost():
    labels = torch.arange(4)
    right, wrong = 5.0 * torch.eye(4), 5.0 * torch.eye(4).roll(1, dims=1)
    retrain = {name: outputs(right, labels) for name in ("remain", "test")}
    retrain["remain"] = outputs(right[:3], labels[:3])  # class 3 is to be forgotten
    judged = {"remain": outputs(right[:3], labels[:3]), "test": outputs(torch.cat([right[:3], wrong[3:]]), labels)}
    found = over_forgetting_metrics(class_accuracies(judged), class_accuracies(retrain))
    assert found == dict.fromkeys(
        ("class_drop_test", "worst_class_drop_test", "class_drop_remain", "worst_class_drop_remain"), 0.0
    )
    judged["test"] = outputs(torch.cat([wrong[:1], right[1:]]), labels)
    found = over_forgetting_metrics(class_accuracies(judged), class_accuracies(retrain))
    assert found["class_drop_test"] == pytest.approx(100 / 3)
    assert found["worst_class_drop_test"] == 100
    # where the request divides the test set, samples that are to be forgotten do not count at all
    judged["test_remain"], retrain["test_remain"] = (outputs(right[1:], labels[1:]) for _ in range(2))
    assert over_forgetting_metrics(class_accuracies(judged), class_accuracies(retrain))["class_drop_test"] == 0
