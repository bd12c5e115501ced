"""The adapter for transformers, on tiny random models written to a local folder."""

import sys

import pytest
import torch
from torch import nn

from torchlethe.models import TransformersClassifier, head_name, normalized

pytest.importorskip("transformers")

TINY = {
    "vit": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "convnext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_stages": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit")
    TransformersClassifier(10, model_type="vit", config=TINY["vit"]).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("model_type", TINY)
def test_returns_logits_and_has_features_and_head(model_type):
    torch.manual_seed(0)
    network = TransformersClassifier(7, model_type=model_type, config=TINY[model_type]).eval()
    image = torch.rand(2, 3, 32, 32)
    logits = network(image)
    features = network.features(image)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)
    assert features.shape == (2, network.head.in_features)
    torch.testing.assert_close(network.head(features), logits)


def test_saved_weights_come_back(folder):
    image = torch.rand(2, 3, 32, 32)
    first = TransformersClassifier(10, folder)
    assert first.training
    torch.testing.assert_close(first.eval()(image), TransformersClassifier(10, folder).eval()(image))


def test_another_number_of_classes_replaces_only_the_head(folder):
    first, other = TransformersClassifier(10, folder), TransformersClassifier(4, folder)
    assert other(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert other.head.out_features == 4
    weights = other.state_dict()
    changed = {key for key, value in first.state_dict().items() if not value.equal(weights[key])}
    assert changed == {"model.classifier.weight", "model.classifier.bias"}


def test_config_entries_replace_saved_ones(folder):
    network = TransformersClassifier(10, folder, config={"hidden_dropout_prob": 0.25})
    assert network.model.config.hidden_dropout_prob == 0.25


def test_composes_with_normalisation_and_head_assignment(folder):
    network = normalized(TransformersClassifier(10, folder), "half").eval()
    assert head_name(network) == "network.model.classifier"
    network.head = nn.Linear(16, 3)
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network.head(network.features(image)), network(image))
    assert network(image).shape == (2, 3)


def test_missing_transformers_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchlethe\[transformers\]'"):
        TransformersClassifier(10, model_type="vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of pretrained and model_type must be given"),
        ({"pretrained": "a", "model_type": "vit"}, "exactly one of pretrained and model_type must be given"),
        ({"model_type": "vitt"}, "model_type 'vitt' is unknown: did you mean .*'vit'"),
    ],
)
def test_wrong_values_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformersClassifier(10, **arguments)


def test_a_folder_without_a_model_gets_one_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="could not be read as an image classifier of transformers") as caught:
        TransformersClassifier(10, str(tmp_path))
    assert "\n" not in str(caught.value)
