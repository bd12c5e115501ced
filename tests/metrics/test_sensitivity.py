"""Input sensitivity: its definition, padding, classes, test loops, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same_bits, quiet_trainer, small_network
from torchlethe.functional import input_sensitivity
from torchlethe.lightning_modules import Classifier
from torchlethe.metrics import InputSensitivity


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 1, 8, 8, generator=generator), torch.arange(9) % 3


def by_hand(network, image, classes):
    """One sample and one logit at a time."""
    network.eval()
    rows = []
    for sample, row in zip(image, classes, strict=True):
        norms = []
        for k in row.tolist():
            leaf = sample.unsqueeze(0).clone().requires_grad_()
            network(leaf)[0, k].backward()
            norms.append(leaf.grad.norm())
        rows.append(torch.stack(norms))
    return torch.stack(rows)


def test_norms_are_those_of_single_gradients_and_the_network_stays_as_it_was(data):
    network, (image, label) = small_network(), data
    classes = torch.stack([label, label + 1], dim=1)
    expected = by_hand(small_network(), image, classes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        found = input_sensitivity(network, image.clone(), classes)
    torch.testing.assert_close(found, expected)
    assert input_sensitivity(network, image, label).shape == (9,)
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert_same_bits(before, network)


def test_means_over_batches_by_logit_and_by_class(data):
    network, (image, label) = small_network(), data
    every = by_hand(small_network(), image, torch.arange(10).expand(9, -1)).double()
    own = every.gather(1, label.unsqueeze(1)).squeeze(1)
    predicted = network.eval()(image).argmax(1, keepdim=True)
    expected = {
        "label": own.mean(),
        "other": ((every.sum(1) - own) / 9).mean(),
        "predicted": every.gather(1, predicted).mean(),
    }
    for logit, value in expected.items():
        metric = InputSensitivity(network, 10, logit=logit)
        for part in range(0, 9, 4):
            metric.update(image[part : part + 4], label[part : part + 4])
        torch.testing.assert_close(metric.compute(), value, rtol=1e-5, atol=0)
    per_class = InputSensitivity(network, 10, per_class=True)
    per_class.update(image, label)
    values = per_class.compute()
    torch.testing.assert_close(values[:3], own.view(3, 3).mean(0), rtol=1e-5, atol=0)
    assert values[3:].isnan().all()


def test_padding_does_not_count_and_the_network_is_no_part_of_the_metric(data):
    network, (image, label) = small_network(), data
    metric, padded = InputSensitivity(network, 10), InputSensitivity(network, 10)
    metric.update(image, label)
    padded.update(torch.cat([image, image[:2]]), torch.cat([label, torch.tensor([-100, -100])]))
    padded.update(image[:1], torch.tensor([-100]))
    assert metric.compute() == padded.compute()
    assert not list(metric.parameters())
    assert metric.clone()._borrowed.network is network


def test_it_works_in_a_test_loop(data):
    class Watched(Classifier):
        def on_test_start(self):
            self.sensitivity = InputSensitivity(self, 10)

        def test_step(self, batch, batch_idx):
            assert torch.is_inference_mode_enabled()
            self.sensitivity.update(*batch)
            self.log("sensitivity", self.sensitivity)

    module = Watched(small_network(), 10)
    scores = quiet_trainer().test(module, DataLoader(TensorDataset(*data), batch_size=4), verbose=False)
    assert scores[0]["sensitivity"] == pytest.approx(float(input_sensitivity(module, *data).double().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"network": 3}, "network is a int, it must be a torch.nn.Module"),
        ({"num_classes": 1}, "num_classes is 1, it must be at least 2"),
        ({"logit": "all"}, "logit is 'all', allowed are label, other and predicted"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        InputSensitivity(**({"network": nn.Linear(2, 2), "num_classes": 2} | arguments))
