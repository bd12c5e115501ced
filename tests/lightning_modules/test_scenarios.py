"""Every method runs on every kind of request, or says in one sentence that it is not made for it."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets

from tests.lightning_modules.methods import (
    MAY_STAY,
    METHODS,
    WHOLE_CLASSES_ONLY,
    divided,
    finite,
    moved,
    plain,
    unlearn,
)
from torchlethe.cli import main
from torchlethe.data import ForgetClasses, ForgetFraction, ForgetIndices, ForgetSubclasses
from torchlethe.io import load_weights, save_weights
from torchlethe.models import SmallCNN

REQUESTS = {
    "class": lambda folder: ForgetClasses([2]),
    "classes": lambda folder: ForgetClasses(["a", 3]),
    "subclass": lambda folder: ForgetSubclasses(["fine7"]),
    "1 %": lambda folder: ForgetFraction(0.01),
    "10 %": lambda folder: ForgetFraction(0.1),
    "50 %": lambda folder: ForgetFraction(0.5),
    ".npy": lambda folder: ForgetIndices(write(folder / "forget.npy")),
    ".json": lambda folder: ForgetIndices(write(folder / "forget.json")),
    ".txt": lambda folder: ForgetIndices(write(folder / "forget.txt")),
}
INDICES = [3, 5, 8, 13, 21, 34, 55, 89]
FILES = (".npy", ".json", ".txt", "1 %")  # one is like the other to a method: only the first of them meets all


def write(path):
    if path.suffix == ".npy":
        np.save(path, np.array(INDICES))
    else:
        path.write_text(json.dumps(INDICES) if path.suffix == ".json" else "\n".join(map(str, INDICES)))
    return path


def cases():
    few = ("sfron", "natmu", "mu_mis", "unsir")
    return [(name, kind) for name in METHODS for kind in REQUESTS if kind not in FILES[1:] or name in few]


@pytest.mark.parametrize(("name", "kind"), cases())
def test_every_method_meets_every_request(name, kind, tmp_path):
    data = divided(REQUESTS[kind](tmp_path))
    module = METHODS[name](plain(), 4)
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    if name in WHOLE_CLASSES_ONLY and kind not in ("class", "classes"):
        with pytest.raises(
            ValueError, match=r"forgets whole classes, but class \d has samples in the forget set and in"
        ):
            unlearn(module, data)
        assert not moved(module.network, before)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a large forget set, of hybrids whose classes run out
        trainer = unlearn(module, data)
    assert trainer.global_step > 0
    assert finite(module)
    if name not in MAY_STAY:
        assert moved(module.network, before)


def test_what_is_forgotten_is_what_was_asked_for(tmp_path):
    for kind, count in {"class": 60, "classes": 120, "subclass": 20, "1 %": 2, "50 %": 120, ".txt": 8}.items():
        data = divided(REQUESTS[kind](tmp_path))
        data.setup()
        assert len(data.role_set("forget")) == count, kind
        assert len(data.role_set("remain")) == 240 - count
    data = divided(REQUESTS["subclass"](tmp_path))
    data.setup()
    forget, remain = data.role_set("forget"), data.role_set("remain")
    assert forget.subclasses.unique().tolist() == [7]
    assert forget.labels.unique().tolist() == [2]
    assert (remain.labels == 2).sum() == 40  # the rest of the superclass remains
    # the test set knows subclasses, so it is divided too
    assert {name: len(loader.dataset) for name, loader in data.evaluation_loaders().items()} == {
        "forget": 20,
        "remain": 220,
        "test": 240,
        "test_forget": 20,
        "test_remain": 220,
    }


YAML_REQUESTS = {
    "class": {"class_path": "ForgetClasses", "init_args": {"classes": [3]}},
    "classes": {"class_path": "ForgetClasses", "init_args": {"classes": [3, 5]}},
    "subclass": {"class_path": "ForgetSubclasses", "init_args": {"subclasses": [13, "fine81"]}},
    "fraction": {"class_path": "ForgetFraction", "init_args": {"fraction": 0.01, "seed": 3}},
    ".npy": {"class_path": "ForgetIndices", "init_args": {"source": "forget.npy"}},
    ".json": {"class_path": "ForgetIndices", "init_args": {"source": "forget.json"}},
    ".txt": {"class_path": "ForgetIndices", "init_args": {"source": "forget.txt"}},
}


@pytest.fixture
def coarse_cifar100(monkeypatch):
    """CIFAR-100 with random pixels, two images of each fine class, in place of torchvision's download."""

    def load(root, train, download):
        pixels = np.random.default_rng(int(train)).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
        names = [f"fine{number}" for number in range(100)]
        return SimpleNamespace(data=pixels, targets=[*range(100)] * 2, classes=names)

    monkeypatch.setattr(datasets, "CIFAR100", load)
    return {"class_path": "CIFAR100DataModule", "init_args": {"coarse": True, "batch_size": 50, "augmentation": None}}


@pytest.mark.parametrize("kind", YAML_REQUESTS)
def test_a_request_is_a_few_lines_of_yaml(kind, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if kind.startswith("."):
        write(tmp_path / f"forget{kind}")
    data = {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64, "augmentation": None}}
    network = {"class_path": "torchlethe.models.SmallCNN"}
    original = SmallCNN()
    if kind == "subclass":
        data = request.getfixturevalue("coarse_cifar100")
        sizes = {"in_channels": 3, "image_size": 32, "num_classes": 20}
        network["init_args"], original = sizes, SmallCNN(**sizes)
    save_weights(original, tmp_path / "original.safetensors")
    config = {
        "model": {
            "class_path": "SFRon",
            "init_args": {
                "network": network,
                "num_classes": 20 if kind == "subclass" else 10,
                "weights": "original.safetensors",
                "steps": 4,
                "forget_every": 2,
            },
        },
        "data": {
            "class_path": "UnlearningDataModule",
            "init_args": {"data": data, "forget": YAML_REQUESTS[kind]},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
    recorded = next((tmp_path / "lightning_logs").rglob("hparams.yaml")).read_text()
    count = {"class": 122, "classes": 244, "subclass": 4, "fraction": 12}.get(kind, len(INDICES))
    assert f"split_forget: {count}\n" in recorded
    weights = next((tmp_path / "lightning_logs").rglob("weights.safetensors"))
    after = load_weights(SmallCNN(**network.get("init_args", {})), weights).state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in original.state_dict().items())
