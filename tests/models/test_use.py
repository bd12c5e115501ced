"""How others use the networks: from YAML, with weights trained elsewhere, paying only for what they import."""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from torchlethe import models
from torchlethe.io import load_weights


def test_factories_work_as_class_path():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    config = parser.parse_string(
        """
        network:
          class_path: torchlethe.models.normalized
          init_args:
            network: {class_path: torchlethe.models.resnet20, init_args: {num_classes: 7}}
            statistics: imagenet
        """
    )
    dumped = parser.dump(config)
    network = parser.instantiate(parser.parse_string(dumped)).network
    assert isinstance(network, models.NormalizedClassifier)
    assert network.head.out_features == 7
    assert network.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("googlenet", {}),
        ("SmallCNN", {"image_size": 9}),
        ("pyramidnet110", {"alpha": 48}),
        ("torchvision_network", {"name": "resnet18", "pretrained": False}),
        ("TransformersClassifier", {"model_type": "resnet", "config": {"depths": [1, 1, 1, 1]}}),
    ],
)
def test_every_kind_of_class_path_parses(name, arguments):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    given = {"class_path": f"torchlethe.models.{name}", "init_args": {"num_classes": 5, **arguments}}
    config = parser.parse_object({"network": given})
    again = parser.parse_string(parser.dump(config))
    with torch.device("meta"):
        network = parser.instantiate(again).network
    assert models.head_of(network).out_features == 5


def test_importing_the_networks_imports_no_other_library():
    code = (
        "import sys, torchlethe.models\n"
        "found = {'torchvision', 'timm', 'transformers', 'lightning', 'jsonargparse'} & set(sys.modules)\n"
        "assert not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.shared
def test_resnet20_trained_elsewhere_reaches_its_accuracy(shared_dir):
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(shared_dir / "data" / "cifar10" / "test.parquet")
    pixels = [np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in table["img"].to_pylist()]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    labels = torch.tensor(table["label"].to_pylist())
    network = models.normalized(models.resnet20(), "imagenet")
    load_weights(network, shared_dir / "weights" / "resnet20_cifar10.safetensors")
    network.eval()
    with torch.inference_mode():
        predicted = torch.cat([network(part.float() / 255).argmax(1) for part in images.split(500)])
    accuracy = 100 * (predicted == labels).double().mean().item()
    assert accuracy == pytest.approx(81.03, abs=0.02)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["resnet32", "resnet56"])
def test_deeper_networks_trained_elsewhere_load(shared_dir, name):
    network = getattr(models, name)()
    load_weights(network, shared_dir / "weights" / f"{name}_cifar10.safetensors")
    assert network.bn1.running_var.ne(1).all()
