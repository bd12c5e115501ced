"""Every method on networks of every kind: it takes its steps, or says in one sentence what the network lacks."""

import warnings

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from tests.helpers import sgd
from tests.lightning_modules.methods import MAY_STAY, METHODS, divided, finite, moved, unlearn
from torchlethe.data import ForgetClasses
from torchlethe.lightning_modules import NatMU
from torchlethe.models import (
    VGG,
    CifarResNet,
    ResNet,
    TransformersClassifier,
    VisionTransformer,
    head_name,
    head_of,
    normalized,
)

TINY_VIT = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def torchvision_vgg():
    """VGG's classifier of three layers, with dropout and in-place ReLU, behind few convolutions."""
    features = torchvision_models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True)
    network = torchvision_models.VGG.__new__(torchvision_models.VGG)
    nn.Module.__init__(network)
    network.features, network.avgpool = features, nn.AdaptiveAvgPool2d(1)
    hidden = [nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(True), nn.Dropout()]
    network.classifier = nn.Sequential(*hidden, nn.Linear(8, 4))
    return network


NETWORKS = {
    "resnet18": lambda: ResNet([1, 1, 1, 1], num_classes=4, width=4),
    "resnet20": lambda: normalized(CifarResNet(8, num_classes=4, width=4), "cifar10"),
    "vgg16_bn": lambda: VGG([[4], [8, 8]], num_classes=4),
    "torchvision vgg16_bn": torchvision_vgg,
    "vit": lambda: VisionTransformer(4, image_size=16, patch_size=8, width=8, depth=2, heads=2, dropout=0.1),
    "torchvision vit": lambda: torchvision_models.VisionTransformer(16, 8, 2, 2, 8, 16, dropout=0.1, num_classes=4),
    "swin_t": lambda: torchvision_models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=4),
    "transformers vit": lambda: TransformersClassifier(
        4, model_type="vit", config=TINY_VIT | {"intermediate_size": 16}
    ),
}


CONVOLUTIONAL, TRANSFORMERS = list(NETWORKS)[:4], list(NETWORKS)[4:]
ON_ALL = ("cf_k", "eu_k", "mu_mis", "boundary_expand", "fisher_new", "influence", "influence_kfac", "msg")
"""Methods that look for heads, blocks or convolutions, or differentiate in unusual ways; the others take turns."""


def cases():
    found = []
    for number, name in enumerate(METHODS):
        few = (CONVOLUTIONAL[number % 4], TRANSFORMERS[(number + 1) % 4])
        found += [(name, network) for network in (NETWORKS if name in ON_ALL else few)]
    return found


def built(network):
    """A network from a fixed initialisation; torchvision's ViT starts with a head of zeros."""
    if network.startswith("transformers"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    found = NETWORKS[network]()
    nn.init.normal_(head_of(found).weight, std=0.1)
    return found


@pytest.mark.parametrize(("name", "network"), cases())
def test_a_method_runs_on_a_network(name, network):
    module = METHODS[name](built(network), 4)
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    data = divided(ForgetClasses([1]), channels=3, size=16, count=48, batch_size=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unlearn(module, data)
    assert finite(module)
    if name not in MAY_STAY:
        assert moved(module.network, before)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_new_head_for_natmu_is_the_classifier(network):
    module = NatMU(built(network), 4, init_linear="head", optimizer=sgd(0.0))
    before = {key: value.clone() for key, value in module.network.named_parameters()}
    data = divided(ForgetClasses([1]), channels=3, size=16, count=48, batch_size=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unlearn(module, data)
    changed = {name for name, value in module.network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"{head_name(module.network)}.weight"}


class Headless(nn.Module):
    """A network whose last layer nobody can find."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(3, 4, 3)

    def forward(self, image):
        return self.score(image).mean((2, 3))


@pytest.mark.parametrize("name", METHODS)
def test_a_network_without_a_head_works_or_is_one_sentence(name):
    module = METHODS[name](Headless(), 4)
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    data = divided(ForgetClasses([1]), channels=3, size=16, count=48, batch_size=24)
    if name in ("cf_k", "eu_k", "boundary_expand", "fisher_new", "fisher", "scar"):
        with pytest.raises(ValueError, match="network Headless has no Linear classifier under the names"):
            unlearn(module, data)
        assert not moved(module.network, before)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unlearn(module, data)
    assert finite(module)
