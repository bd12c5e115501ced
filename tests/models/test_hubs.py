"""Networks of torchvision and timm, and finding the head of a network that is not ours."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torchlethe.models import (
    features_of,
    head_name,
    head_of,
    normalized,
    replace_head,
    timm_network,
    torchvision_network,
)

HEADS = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "mobilenet_v3_small": "classifier.3",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "swin_t": "head",
    "vit_b_16": "heads.head",
    "googlenet": "fc",
    "inception_v3": "fc",
}


@pytest.mark.parametrize("name", HEADS)
def test_torchvision_networks_get_their_head(name):
    with torch.device("meta"):
        network = torchvision_network(name, num_classes=7)
    assert head_name(network) == HEADS[name]
    assert head_of(network).out_features == 7
    assert [m.out_features for m in network.modules() if isinstance(m, nn.Linear)].count(1000) == 0


def test_torchvision_vit_for_small_images():
    with torch.device("meta"):
        network = torchvision_network("vit_b_16", 5, image_size=64)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 5)
    assert network.encoder.pos_embedding.shape == (1, 17, 768)


def test_options_reach_the_builder():
    with torch.device("meta"):
        network = torchvision_network("swin_t", 5, options={"dropout": 0.25})
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} >= {0.25}


def test_features_of_a_torchvision_network_are_the_input_of_its_head():
    torch.manual_seed(0)
    network = torchvision_network("shufflenet_v2_x0_5", 4).eval()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    features = features_of(network, image)
    torch.testing.assert_close(network.fc(features), network(image))
    features.sum().backward()
    assert image.grad.abs().sum() > 0
    wrapped = normalized(network, "imagenet")
    torch.testing.assert_close(wrapped.head(wrapped.features(image)), wrapped(image))
    assert not network.fc._forward_pre_hooks


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A private folder of downloaded weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_pretrained_weights_of_torchvision_load_and_the_head_is_replaced(hub):
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    original = mobilenet_v3_small()
    torch.save(original.state_dict(), hub / Path(MobileNet_V3_Small_Weights.DEFAULT.url).name)
    network = torchvision_network("mobilenet_v3_small", 6, pretrained=True)
    assert network.features[0][0].weight.equal(original.features[0][0].weight)
    assert head_of(network).out_features == 6
    kept = torchvision_network("mobilenet_v3_small", 1000, pretrained="IMAGENET1K_V1")
    assert head_of(kept).weight.equal(original.classifier[3].weight)


class _Touch:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pretrained_weights_that_would_run_code_are_refused(hub, tmp_path):
    from torchvision.models import MobileNet_V3_Small_Weights

    mark = tmp_path / "executed"
    with (hub / Path(MobileNet_V3_Small_Weights.DEFAULT.url).name).open("wb") as file:
        pickle.dump(_Touch(mark), file, protocol=2)
    with pytest.raises(RuntimeError, match=r"could not be fetched from .* or read") as caught:
        torchvision_network("mobilenet_v3_small", 6, pretrained=True)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fc"), ("vit_tiny_patch16_224", "head"), ("convnext_atto", "head.fc")]
)
def test_timm_networks_get_their_head(name, head):
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_network(name, num_classes=7, in_channels=1)
        image = torch.empty(2, 1, 224, 224)
        features = features_of(network, image)
        assert network(image).shape == (2, 7)
    assert head_name(network) == head
    assert features.shape == (2, head_of(network).in_features)


def test_timm_options():
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_network("vit_tiny_patch16_224", 7, options={"img_size": 32, "patch_size": 4})
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_two_classifiers_have_no_single_head():
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_network("deit_tiny_distilled_patch16_224", 7)
    with pytest.raises(ValueError, match="averages two classifiers"):
        head_of(network)


def test_missing_timm_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs timm, install it with: pip install 'torchlethe\[timm\]'"):
        timm_network("resnet18", 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torchvision_network("resnet19", 10), "name 'resnet19' is unknown: did you mean .*'resnet18'"),
        (lambda: torchvision_network("resnet18", 0), "num_classes must be an integer of at least 2, got 0"),
        (lambda: torchvision_network("resnet18", 10, image_size=32), "image_size is for the ViTs of torchvision only"),
        (lambda: torchvision_network("resnet18", 10, pretrained="IMAGENET1K_V9"), "did you mean 'IMAGENET1K_V1'"),
        (lambda: torchvision_network("resnet18", 10, options={"dropuot": 0.1}), "options .* do not suit .*'dropuot'"),
        (lambda: torchvision_network("squeezenet1_1", 10), "SqueezeNet has no Linear classifier"),
        (lambda: timm_network("resnet_18", 10), "name 'resnet_18' is unknown: did you mean .*'resnet18'"),
        (lambda: timm_network("resnet18", 10, options={"imgsize": 9}), "options .* do not suit .*'imgsize'"),
        (lambda: head_of(nn.Conv2d(1, 1, 1)), "Conv2d has no Linear classifier"),
        (lambda: replace_head(nn.Linear(2, 3), 4), "single Linear layer"),
    ],
)
def test_wrong_values_get_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_replace_head_keeps_what_fits():
    network = torchvision_network("shufflenet_v2_x0_5", 4)
    old = network.fc
    assert replace_head(network, 4).fc is old
    assert replace_head(network, 5).fc.out_features == 5
