import math

import numpy as np
import pytest
import torch

from torchlethe.functional.uncertainty import (
    accuracy,
    confidence,
    correctness,
    entropy,
    membership_feature,
    modified_entropy,
    modified_entropy_as_published,
    sample_loss,
)

SCORES = [correctness, confidence, sample_loss, entropy, modified_entropy, modified_entropy_as_published]


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


def test_entropies_agree_with_the_official_code(golden):
    logits, labels = golden["logits_forget"], golden["y_forget"]
    torch.testing.assert_close(entropy(logits), golden["entropy_forget"], rtol=0, atol=1e-12)
    found = {"correct": modified_entropy, "as_coded": modified_entropy_as_published}
    for name, function in found.items():
        torch.testing.assert_close(function(logits, labels), golden[f"m_entropy_forget_{name}"], rtol=0, atol=1e-12)


def test_accuracies_agree_with_the_official_code(golden):
    for name in ("retain", "test", "forget"):
        assert accuracy(golden[f"logits_{name}"], golden[f"y_{name}"]) == golden[f"acc_{name}"].item()
    assert accuracy(golden["logits_forget_retrained"], golden["y_forget"]) == golden["acc_forget_retrained"].item()


@pytest.mark.parametrize("score", SCORES)
def test_padding_rows_change_nothing(score):
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    padded = torch.cat([logits[:2], torch.full((1, 4), 7.0), logits[2:]])
    padded_labels = torch.cat([labels[:2], torch.tensor([-100]), labels[2:]])
    assert torch.equal(score(padded, padded_labels), score(logits, labels))


@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_stay_finite_in_float32(score):
    logits = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 200.0, 0.0], [0.0, 0.0, 0.0]])
    for label in range(3):
        assert score(logits, torch.full((3,), label)).isfinite().all()


def test_modified_entropy_is_small_only_for_sure_and_right():
    sure = torch.tensor([[20.0, 0.0, 0.0]], dtype=torch.float64)
    assert modified_entropy(sure, torch.tensor([0])) < 1e-6
    assert modified_entropy(sure, torch.tensor([1])) > 19


def test_modified_entropy_with_two_classes_is_the_formula():
    p = 0.8
    logits = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
    # −(1−p_y) log p_y − p_other log(1 − p_other), and p_other = 1 − p_y
    expected = -(1 - p) * math.log(p) - (1 - p) * math.log(p)
    assert modified_entropy(logits, torch.tensor([0])).item() == pytest.approx(expected, abs=1e-14)


def test_published_modified_entropy_depends_on_the_labels_around():
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = modified_entropy_as_published(logits[:1], torch.tensor([0]))
    together = modified_entropy_as_published(logits, torch.tensor([0, 2]))[:1]
    assert not torch.allclose(alone, together)
    p = logits[0].softmax(0)
    expected = -((1 - p[0]) * p[0].log() + p[1] * p[1].log() + p[2] * p[2].log())
    assert alone.item() == pytest.approx(expected.item(), abs=1e-14)


def test_accuracy_without_samples_is_nan():
    assert math.isnan(accuracy(torch.zeros(1, 2), torch.tensor([-100])))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "logits must be"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "at least 2 classes"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "each of the 3 rows"),
        (torch.zeros(3, 2), torch.zeros(3), "one integer"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "0…1"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "0…1"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(logits, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        confidence(logits, labels)
    assert "\n" not in str(caught.value)


def test_unknown_feature_names_are_refused():
    arguments = (torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="feature is 'margin', allowed are correctness, "):
        membership_feature("margin", *arguments)
    with pytest.raises(ValueError, match="m_entropy is 'mine', allowed are "):
        membership_feature("m_entropy", *arguments, m_entropy="mine")
