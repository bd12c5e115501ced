import math

import numpy as np
import pytest
import torch

from torchlethe.metrics import (
    ActivationDistance,
    Completeness,
    DivergenceToReference,
    RoleAccuracy,
    Wasserstein1,
    ZeroRetrainForgetting,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {name: torch.from_numpy(np.asarray(a)) for name, a in np.load(golden_dir / "mu_metrics.npz").items()}


def feed(metric, golden):
    for rows in torch.arange(120).split(50):
        logits, reference = golden["logits_forget"][rows], golden["logits_forget_retrained"][rows]
        labels = golden["y_forget"][rows]
        padding = torch.tensor([-100])
        metric.update(
            torch.cat([logits, logits[:1]]), torch.cat([reference, reference[1:2]]), torch.cat([labels, padding])
        )
    return metric.compute().item()


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (DivergenceToReference("kl"), "kl_div_retrain_to_unlearn"),
        (DivergenceToReference("js"), "js_div"),
        (ZeroRetrainForgetting(), "zrf"),
        (ActivationDistance(), "activation_distance"),
        (Wasserstein1("confidence"), "wasserstein1_confidence"),
        (Wasserstein1("loss"), "wasserstein1_loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_with_padding_agree_with_the_official_code(golden, metric, name):
    assert feed(metric, golden) == pytest.approx(golden[name].item(), abs=1e-12)


def test_completeness_in_percent(golden):
    agree = golden["logits_forget"].argmax(1) == golden["logits_forget_retrained"].argmax(1)
    assert feed(Completeness(), golden) == pytest.approx(100 * agree.double().mean().item())


def test_single_precision_is_summed_in_double():
    metric = DivergenceToReference("kl")
    logits = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    for part in logits.split(1):
        metric.update(part, part.flip(1))
    once = DivergenceToReference("kl")
    once.update(logits, logits.flip(1))
    assert metric.compute().item() == pytest.approx(once.compute().item(), rel=1e-13)


def test_without_samples_the_mean_is_nan():
    metric = ActivationDistance()
    metric.update(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([-100]))
    assert math.isnan(metric.compute())


def test_accuracy_of_each_role(golden):
    metric = RoleAccuracy(("forget", "remain", "test", "validation"))
    for role, name in (("forget", "forget"), ("remain", "retain"), ("test", "test")):
        logits, labels = golden[f"logits_{name}"], golden[f"y_{name}"]
        metric.update(torch.cat([logits, logits[:1]]), torch.cat([labels, torch.tensor([-100])]), role)
    found = metric.compute()
    assert found["forget_accuracy"].item() == pytest.approx(golden["acc_forget"].item(), abs=1e-12)
    assert found["remain_accuracy"].item() == pytest.approx(golden["acc_retain"].item(), abs=1e-12)
    assert found["test_accuracy"].item() == golden["acc_test"].item()
    assert math.isnan(found["validation_accuracy"])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="kind is 'hellinger', allowed are kl and js"):
        DivergenceToReference("hellinger")
    with pytest.raises(ValueError, match="roles="):
        RoleAccuracy(("test", "test"))
    with pytest.raises(ValueError, match="role is 'train', allowed are "):
        RoleAccuracy().update(torch.zeros(1, 2), torch.tensor([0]), "train")
