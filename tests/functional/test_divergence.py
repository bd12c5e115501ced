import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from torchlethe.functional.divergence import (
    activation_distance,
    completeness,
    js_bad_teacher,
    js_to_reference,
    kl_to_reference,
    parameter_distance,
    wasserstein1,
    zero_retrain_forgetting,
)
from torchlethe.functional.uncertainty import confidence, sample_loss

PER_SAMPLE = [kl_to_reference, js_to_reference, js_bad_teacher, activation_distance, completeness]


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


@pytest.fixture(scope="module")
def pair(golden):
    return golden["logits_forget"], golden["logits_forget_retrained"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (kl_to_reference, "kl_div_retrain_to_unlearn"),
        (js_to_reference, "js_div"),
        (js_bad_teacher, "jsdiv_badteacher"),
        (activation_distance, "activation_distance"),
    ],
)
def test_means_agree_with_the_official_code(golden, pair, function, name):
    assert function(*pair).mean().item() == pytest.approx(golden[name].item(), abs=1e-12)


def test_zrf_agrees_with_the_official_code(golden, pair):
    assert zero_retrain_forgetting(*pair) == pytest.approx(golden["zrf"].item(), abs=1e-12)


def test_wasserstein_agrees_with_scipy(golden, pair):
    labels = golden["y_forget"]
    for name, score in (("confidence", confidence), ("loss", sample_loss)):
        found = wasserstein1(score(pair[0], labels), score(pair[1], labels))
        assert found == pytest.approx(golden[f"wasserstein1_{name}"].item(), abs=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 8), (40, 3), (1, 7)])
def test_wasserstein_of_unequal_sizes_with_ties(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    a, b = ((torch.rand(n, generator=generator) * 8).round() / 8 for n in sizes)
    assert wasserstein1(a, b) == pytest.approx(wasserstein_distance(a.numpy(), b.numpy()), abs=1e-12)


@pytest.mark.parametrize("function", PER_SAMPLE)
def test_padding_rows_change_nothing(pair, function):
    labels = torch.zeros(len(pair[0]), dtype=torch.long)
    labels[3] = -100
    kept = labels >= 0
    assert torch.equal(function(*pair, labels), function(pair[0][kept], pair[1][kept]))


@pytest.mark.parametrize("function", PER_SAMPLE[:-1])
def test_equal_models_are_at_distance_zero(pair, function):
    assert function(pair[0], pair[0]).abs().max() < 1e-12


def test_js_is_symmetric_and_bounded():
    a, b = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert js_to_reference(a, b).item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(js_to_reference(a, b), js_to_reference(b, a))


def test_saturated_outputs_give_finite_distances():
    a, b = torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])
    for function in PER_SAMPLE[:-1]:
        assert function(a, b).isfinite().all()


def test_completeness_compares_predictions():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0], [1.0, 0.0]])
    assert completeness(a, b).tolist() == [True, False]


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"same shape .* got \(2, 3\) and \(2, 4\)"):
        kl_to_reference(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="non-empty"):
        wasserstein1(torch.zeros(0), torch.zeros(2))


def test_parameter_distance_by_layer():
    a = {"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    found = parameter_distance(a, {"w": torch.zeros(2), "b": torch.tensor([0.0, 2.0])})
    assert found["w"] == (5.0, 1.0)
    assert found["b"][0] == 2.0
    assert math.isnan(found["b"][1])
    with pytest.raises(ValueError, match="differ in the tensors"):
        parameter_distance(a, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'w' has the shapes"):
        parameter_distance(a, {"w": torch.zeros(3), "b": torch.zeros(2)})
