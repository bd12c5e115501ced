"""Features and activations are what a layer was given and gave, also where a layer behind it works in place."""

import pytest
import torch
from torch import nn

from torchlethe.components import SplitNetwork, UniversalNoise
from torchlethe.updates.attacks import DeepFoolAttack


def network(inplace):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(108, 5), nn.ReLU(inplace), nn.Linear(5, 4)
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.parametrize("layer", ["4", "5"])
def test_layers_in_place_change_nothing(layer):
    image = torch.rand(2, 1, 8, 8)
    plain, inplace = (SplitNetwork(network(kind), layer, ["0"])(image) for kind in (False, True))
    assert torch.equal(plain.features, inplace.features)
    assert torch.equal(plain.activations[0], inplace.activations[0])
    assert float(inplace.activations[0].min()) < 0
    assert torch.equal(plain.logits, inplace.logits)


def test_a_network_in_train_mode_is_refused():
    split = SplitNetwork(network(False).train())
    with pytest.raises(RuntimeError, match="train mode"):
        split(torch.rand(1, 1, 8, 8))
    split.close()


def test_one_deepfool_step_crosses_a_linear_border():
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval().requires_grad_(False)
    split, image = SplitNetwork(linear), torch.rand(1, 1, 8, 8)
    label = int(linear(image).argmax())
    step = DeepFoolAttack(max_iterations=1).smallest_step(split, image, label)
    assert step is not None
    assert int(linear(image + step).argmax()) != label
    noise = UniversalNoise((1, 8, 8), 1.0, clamp=False, init="zero")
    DeepFoolAttack(max_iterations=1).step(split, noise, {"image": image, "clean_logits": linear(image)}, 0)
    torch.testing.assert_close(noise.v.detach(), step)
