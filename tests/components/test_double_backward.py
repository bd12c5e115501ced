"""The short cuts for double differentiation change no gradient, and stay away where they would."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import assert_same_bits
from torchlethe.components import DoubleBackward, ForgetSamples
from torchlethe.functional.mean_loss import differentiable_twice
from torchlethe.functional.sensitivity import input_gradient, squared_norms
from torchlethe.models import resnet8


class SharedConvolution(nn.Module):
    """A convolution whose output goes into BatchNorm and around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, image):
        y = self.conv(image)
        y = F.relu(self.bn2(self.conv2(y + self.bn(y))))
        return self.linear(y.mean((2, 3)))


class NeedsInPlace(nn.Module):
    """Uses a tensor again that a ReLU has changed in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.linear = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, image):
        y = self.conv(image)
        return self.linear((self.relu(y) + y).mean((2, 3)))


def pooled(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


NETWORKS = {
    "resnet": (lambda: resnet8(num_classes=5), 7, True),
    "smooth": (
        lambda: pooled(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 6, 3)),
        1,
        True,
    ),
    "max pooling": (
        lambda: pooled(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
        ),
        1,
        True,
    ),
    "groups, stride, dilation": (
        lambda: pooled(
            nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(6, 6, 3, padding="same")
        ),
        0,
        True,
    ),
    "linear and BatchNorm1d": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU6(), nn.Linear(8, 5)),
        1,
        True,
    ),
    "read by another": (SharedConvolution, 1, True),
    "in-place matters": (NeedsInPlace, 0, False),
}


def weight_gradients(network, image, classes, short_cuts=None):
    image = image.clone().requires_grad_()
    with differentiable_twice(network):
        if short_cuts is None:
            logits = network(image)
        else:
            with short_cuts.active():
                logits = network(image)
        loss = squared_norms(input_gradient(logits, image, classes, create_graph=True)).sum()
        return torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_plain_autograd(name):
    build, folded, piecewise = NETWORKS[name]
    torch.manual_seed(0)
    network, image = build(), torch.rand(3, 3, 8, 8)
    network(image)  # statistics other than the first ones
    network, image, classes = network.double(), image.double(), torch.tensor([4, 0, 2])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    short_cuts = DoubleBackward(network, image[:2])
    assert len(short_cuts.folded) == folded
    assert short_cuts.piecewise == piecewise
    expected = weight_gradients(network, image, classes)
    for found, plain in zip(weight_gradients(network, image, classes, short_cuts), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-13)
    assert_same_bits(before, network)
    assert all(part.training and "forward" not in part.__dict__ for part in network.modules())


def test_a_convolution_with_hooks_or_a_forward_of_its_own_is_left_alone():
    def network():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))

    image = torch.rand(2, 1, 4, 4)
    hooked, own = network(), network()
    hooked[0].register_forward_hook(lambda *_: None)
    own[0].forward = lambda x: F.conv2d(x, own[0].weight * 2)
    for net in (hooked, own):
        assert DoubleBackward(net, image).folded == []
    assert DoubleBackward(network(), image).folded == [("0", "1")]
    assert "forward" in own[0].__dict__


@pytest.mark.parametrize(("count", "limit", "stride"), [(10, 512, 1), (100, 60, 2), (100, 13, 8), (64, 16, 4)])
def test_the_kept_samples_are_spread_evenly(count, limit, stride):
    samples = ForgetSamples(limit)
    for rows in torch.arange(count).split(7):
        label = rows % 3
        samples.add({"image": rows.float().view(-1, 1), "label": label, "index": rows + 1000}, keep_ids=True)
    samples.add({"image": torch.zeros(1, 1), "label": torch.tensor([-100]), "index": torch.tensor([-1])})
    samples.finish()
    image, label, ids = samples.kept
    assert image.flatten().tolist() == list(range(0, count, stride))
    assert torch.equal(ids, torch.arange(0, count, stride) + 1000)
    assert torch.equal(label, torch.arange(0, count, stride) % 3)
    assert sum(len(part[1]) for part in samples.chunks()) == len(ids) <= limit
    assert len(samples.all_ids) == count


def test_an_empty_forget_set_is_one_sentence():
    with pytest.raises(ValueError, match="the forget set is empty"):
        ForgetSamples(4).finish()
