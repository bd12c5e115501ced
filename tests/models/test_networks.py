"""Every network: its size, its features and head, what it composes with, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchlethe import models

COUNTS = {
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "preact_resnet18": 11_172_170,
    "senet18": 11_260_354,
    "densenet121": 6_956_298,
    "googlenet": 6_166_250,
    "vgg16_bn": 14_728_266,
    "wrn28_2": 1_467_610,
    "wrn28_10": 36_479_194,
    "pyramidnet110": 28_485_477,
    "vit_tiny": 5_362_762,
    "vit_small": 21_342_346,
}

# The same code at sizes that a CPU runs in a moment.
LITTLE: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.MLP(7, 3, 32, hidden=(16, 8)),
    "small_cnn": lambda: models.SmallCNN(7, 3, 32),
    "resnet8": lambda: models.resnet8(7),
    "resnet": lambda: models.ResNet((1, 1, 1, 1), 7, width=8),
    "preact": lambda: models.PreActResNet((1, 1, 1, 1), 7),
    "senet": lambda: models.PreActResNet((1, 1, 1, 1), 7, excitation=16, stem_norm=True, final_norm=False),
    "densenet": lambda: models.DenseNet((2, 2, 2, 2), 8, 7),
    "googlenet": lambda: models.googlenet(7),
    "vgg": lambda: models.VGG(((8,), (16,), (16, 16), (16,), (16,)), 7),
    "wrn": lambda: models.WideResNet(10, 2, 7),
    "pyramidnet": lambda: models.PyramidNet(20, 48, 7),
    "vit": lambda: models.VisionTransformer(7, width=24, depth=2, heads=3),
}


@pytest.fixture(params=LITTLE)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LITTLE[request.param]().eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_documented_ones(name):
    factory = getattr(models, name)
    with torch.device("meta"):
        network = factory()
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert models.parameter_count(network) == COUNTS[name]
    assert f"{COUNTS[name]:,} parameters".replace(",", " ") in factory.__doc__


def test_parameter_counts_of_variants_and_small_networks():
    with torch.device("meta"):
        assert models.parameter_count(models.MLP()) == 26_122
        assert models.parameter_count(models.SmallCNN()) == 71_802
        assert models.parameter_count(models.SmallCNN(10, 3, 32)) == 1_055_130
        assert models.parameter_count(models.pyramidnet110(alpha=48)) == 1_772_706
        assert models.parameter_count(models.densenet121(growth=12)) == 1_000_618
        assert models.parameter_count(models.preact_resnet18(final_norm=False)) == 11_171_146
        assert models.parameter_count(models.wrn28_10(100)) == 36_536_884


@pytest.mark.parametrize("name", COUNTS)
def test_factories_take_classes_and_channels(name):
    with torch.device("meta"):
        network = getattr(models, name)(num_classes=100, in_channels=1)
        features = network.features(torch.empty(3, 1, 32, 32))
    assert features.shape == (3, network.head.in_features)
    assert network.head.out_features == 100


def test_small_cnn_has_the_layers_of_its_description():
    network = models.SmallCNN(num_classes=4, in_channels=1, image_size=9)
    assert (network.conv1.out_channels, network.conv1.stride) == (16, (1, 1))
    assert (network.conv2.out_channels, network.conv2.stride) == (32, (2, 2))
    assert network.features(torch.rand(2, 1, 9, 9)).shape == (2, 128)


def test_forward_is_head_of_features(network):
    image = torch.rand(3, 3, 32, 32)
    features = network.features(image)
    assert features.ndim == 2
    torch.testing.assert_close(network.head(features), network(image), rtol=0, atol=0)
    assert models.features_of(network, image).equal(features)
    assert models.head_name(network) == "linear"


def test_assigning_a_head_replaces_the_classifier(network):
    width = network.head.in_features
    before = models.parameter_count(network)
    network.head = nn.Linear(width, 3)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert models.parameter_count(network) == before - 4 * (width + 1)


def test_gradients_of_gradients_reach_every_parameter(network):
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss = nn.functional.cross_entropy(network(image), torch.tensor([1, 5]))
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    gradient.square().sum().backward()
    first = next(network.parameters())
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert first.grad.abs().max() > 0


def test_channels_last_changes_nothing_and_is_kept_by_every_convolution(network):
    image = torch.rand(2, 3, 32, 32)
    expected = network(image)
    network.to(memory_format=torch.channels_last)
    kept = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda _, inputs, output: kept.append(
                    all(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output))
                )
            )
    actual = network(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(kept)


@pytest.mark.parametrize("name", ["small_cnn", "resnet8", "resnet", "senet", "densenet", "wrn", "pyramidnet", "vit"])
def test_compiles_without_graph_breaks(name):
    torch.manual_seed(0)
    network = models.normalized(LITTLE[name](), "cifar10").eval()
    image = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), network(image))
    assert models.head_of(compiled) is network.head


@pytest.mark.parametrize("name", ["resnet8", "resnet", "preact", "densenet", "wrn", "pyramidnet"])
def test_larger_and_odd_images_are_taken(name):
    assert LITTLE[name]().eval()(torch.rand(1, 3, 45, 37)).shape == (1, 7)


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    block = models.CifarResNet(8).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)  # switches the residual off
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert y[:, 8:24].equal(x[:, :, ::2, ::2])
    assert y[:, :8].eq(0).all()
    assert y[:, 24:].eq(0).all()


def test_without_excitation_weights_a_block_is_the_plain_one():
    torch.manual_seed(0)
    network = models.PreActResNet((1, 1, 1, 1), 7, excitation=16).eval()
    plain = models.PreActResNet((1, 1, 1, 1), 7).eval()
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if ".fc" not in key})
    image = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(network(image), plain(image))
    for module in network.modules():
        if hasattr(module, "fc2"):
            nn.init.zeros_(module.fc2.weight)
            nn.init.constant_(module.fc2.bias, 100.0)  # sigmoid = 1
    torch.testing.assert_close(network(image), plain(image))


def test_vit_attention_agrees_with_the_fused_kernel():
    torch.manual_seed(0)
    attention = models.VisionTransformer(width=24, depth=1, heads=3).blocks[0].attention
    x = torch.rand(2, 5, 24)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    heads = [part.view(2, 5, 3, 8).transpose(1, 2) for part in (query, key, value)]
    mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 5, 24)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.resnet20(1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: models.resnet20(10.0), "num_classes must be an integer of at least 2, got 10.0"),
        (lambda: models.resnet18(True), "num_classes must be an integer of at least 2, got True"),
        (lambda: models.resnet18(in_channels=0), "in_channels must be an integer of at least 1, got 0"),
        (lambda: models.CifarResNet(18), "depth must be 6 n \\+ 2 .*got 18"),
        (lambda: models.WideResNet(27), "depth must be 6 n \\+ 4 .*got 27"),
        (lambda: models.PyramidNet(111), "depth must be 6 n \\+ 2 .*got 111"),
        (lambda: models.ResNet((2, 2)), "blocks must be four positive integers.*got \\[2, 2\\]"),
        (lambda: models.MLP(hidden=()), "hidden must name at least one width"),
        (lambda: models.vit_tiny(patch_size=5), "patch_size must divide image_size, got 5 and 32"),
        (lambda: models.VisionTransformer(heads=5), "heads must divide width, got 5 and 192"),
        (lambda: models.wrn28_2(dropout=1.0), "dropout is 1.0, it must lie in \\[0, 1\\)"),
        (lambda: models.SmallCNN()(torch.rand(1, 1, 28, 28)), "28×28 pixels, .*image_size=8"),
        (lambda: models.VGG()(torch.rand(1, 3, 16, 16)), "16×16 pixels, .* at least 32×32"),
        (lambda: models.resnet8()(torch.rand(1, 1, 32, 32)), "1 channels, .*in_channels=3"),
        (lambda: models.resnet8()(torch.rand(3, 32, 32)), "shape \\(B, C, H, W\\), got \\(3, 32, 32\\)"),
    ],
)
def test_wrong_values_get_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bytes_are_refused():
    with pytest.raises(TypeError, match=r"floating-point .*got torch\.uint8"):
        models.resnet8()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
