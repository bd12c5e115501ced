"""Normalisation in front of a network, saved with it."""

import copy

import pytest
import torch
from torch import nn

from torchlethe import models
from torchlethe.models import STATISTICS, Normalize, normalized


@pytest.mark.parametrize("name", STATISTICS)
def test_normalized_standardises_the_image(name):
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in STATISTICS[name])
    image = torch.rand(2, 3, 4, 4)
    wrapped = normalized(nn.Identity(), name)
    torch.testing.assert_close(wrapped(image), (image - mean) / std)


def test_statistics_of_cifar10_are_the_usual_ones():
    assert STATISTICS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_own_statistics_and_half_precision():
    wrapped = normalized(nn.Identity(), mean=[0.1], std=[0.2])
    image = torch.full((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(wrapped(image), torch.full((1, 1, 2, 2), 2.0))
    assert wrapped(image.to(torch.bfloat16)).dtype == torch.bfloat16


def test_features_and_head_are_those_of_the_network():
    network = models.SmallCNN(5)
    wrapped = normalized(network, "half").eval()
    image = torch.rand(2, 1, 8, 8)
    features = wrapped.features(image)
    assert features.equal(network.features(wrapped.normalize(image)))
    assert wrapped.head is network.linear
    assert wrapped.head(features).equal(wrapped(image))
    assert models.head_name(wrapped) == "network.linear"
    wrapped.head = nn.Linear(128, 2)
    assert wrapped(image).shape == (2, 2)
    assert network.linear.out_features == 2


def test_statistics_are_saved_with_the_weights():
    saved = normalized(models.SmallCNN(), mean=[0.3], std=[0.4])
    loaded = normalized(models.SmallCNN(), "half")
    loaded.load_state_dict(saved.state_dict())
    assert loaded.normalize.mean.item() == pytest.approx(0.3)
    assert loaded.normalize.std.item() == pytest.approx(0.4)


def test_weights_of_the_bare_network_load_and_keep_the_statistics():
    bare = models.resnet8()
    holder = nn.ModuleDict({"network": normalized(models.resnet8(), "svhn")})
    holder["network"].load_state_dict(bare.state_dict())
    assert holder["network"].network.conv1.weight.equal(bare.conv1.weight)
    assert holder["network"].normalize.mean.flatten().tolist() == pytest.approx(STATISTICS["svhn"][0])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        holder["network"].load_state_dict({**bare.state_dict(), "other.weight": torch.zeros(1)})


def test_a_copy_is_independent():
    wrapped = normalized(models.resnet8())
    before = wrapped.network.conv1.weight.clone()
    twin = copy.deepcopy(wrapped)
    bare = models.resnet8()
    twin.load_state_dict(bare.state_dict())
    assert twin.network.conv1.weight.equal(bare.conv1.weight)
    assert wrapped.network.conv1.weight.equal(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalized(nn.Identity(), "cifar-10"), "statistics must be one of .*did you mean 'cifar10'"),
        (lambda: normalized(nn.Identity(), mean=[0.5]), "mean and std must be given together"),
        (lambda: Normalize([0.5], [0.5, 0.5]), "same positive length, got 1 and 2 numbers"),
        (lambda: Normalize([], []), "same positive length, got 0 and 0 numbers"),
        (lambda: Normalize([0.5], [0.0]), "std must be positive, got \\[0.0\\]"),
        (lambda: normalized(nn.Identity())(torch.rand(1, 1, 2, 2)), "1 channels, but the statistics are for 3"),
    ],
)
def test_wrong_values_get_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bytes_are_refused():
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        Normalize([0.5], [0.5])(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
