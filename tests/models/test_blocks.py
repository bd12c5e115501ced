"""The last blocks of networks of every kind."""

import pytest
import torch
from torchvision import models as torchvision_models

from torchlethe.models import MLP, SmallCNN, normalized, resnet8, resnet18
from torchlethe.models.blocks import block_names, last_blocks


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (SmallCNN, ["hidden", "linear"]),
        (MLP, ["layers.1", "linear"]),
        (resnet18, ["layer4.1", "linear"]),
        (lambda: normalized(resnet8(), "cifar10"), ["network.layer3.0", "network.linear"]),
        (torchvision_models.vgg16_bn, ["classifier.3", "classifier.6"]),
        (torchvision_models.swin_t, ["features.7.1", "norm", "head"]),
        (torchvision_models.vit_b_16, ["encoder.layers.encoder_layer_11", "encoder.ln", "heads.head"]),
    ],
)
def test_the_last_block_comes_with_its_normalisation_and_the_head(make, last):
    with torch.device("meta"):
        network = make()
    assert last_blocks(network, 1) == last
    assert last_blocks(network, 0) == last[-1:]


def test_all_blocks_together_hold_every_weight():
    network = resnet18()
    names = last_blocks(network, len(block_names(network)))
    held = sum(p.numel() for name in names for p in network.get_submodule(name).parameters())
    assert held == sum(p.numel() for p in network.parameters())


def test_more_blocks_than_there_are_is_one_sentence():
    with pytest.raises(ValueError, match="blocks is 4, but the network has 3 in front of its head: 0 to 3"):
        last_blocks(SmallCNN(), 4)
