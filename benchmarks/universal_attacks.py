"""Universal attacks on a CIFAR-10 classifier, side by side: fooling ratio on the test set.

python benchmarks/universal_attacks.py --weights resnet20.safetensors --data data/cifar10 --images 500 --xi 10

Crafts with each method on the same images, selects on the same others, judges on the test set (or the first
``--test-images`` of it, which are class-balanced), and adds a line for each to a JSON-lines file. Perturbed images are
clamped to [0, 1]. The perturbations are kept beside it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from torchlethe import lightning_modules as methods
from torchlethe.callbacks import ChannelsLast
from torchlethe.data import InMemoryImages
from torchlethe.datamodules import HuggingFaceDataModule, ImageDataModule, ProxyImages
from torchlethe.io import load_weights
from torchlethe.models import CifarResNet, normalized

METHODS = {
    "random": ("RandomPerturbation", {}),
    "fg": ("FeatureGatheringUAP", {}),
    "fg_zero": ("FeatureGatheringUAP", {"init": "zero"}),
    "fg_target0": ("FeatureGatheringUAP", {"target": 0}),
    "cosine": ("CosineUAP", {}),
    "df": ("DFUAP", {}),
    "sgd": ("SGDUAP", {"step_size": 0.1}),
    "gap": ("GAPUAP", {}),
    "nag": ("NAGUAP", {}),
    "gd": ("GDUAP", {}),
    "cosine_jigsaw": ("CosineUAP", {}),
    "fg_jigsaw": ("FeatureGatheringUAP", {}),
    "trm_jigsaw": ("TRMUAP", {}),
    "deepfool": ("DeepFoolUAP", {}),
}


class Memory(ImageDataModule):
    """Images of another datamodule, decoded once."""

    num_classes = 10

    def __init__(self, source: ImageDataModule, batch_size: int, test: int | None) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=500, augmentation=None)
        source.setup()
        self.train_set, self.validation_set, self.test_set = (
            InMemoryImages(part["image"], part["label"])
            for part in (
                every(source.train_set),
                every(source.validation_set),
                every(source.test_set, test),
            )
        )


def every(dataset, count=None):
    """All samples of a data set as one batch."""
    return dataset[range(len(dataset) if count is None else min(count, len(dataset)))]


def network(depth: int, weights: str) -> torch.nn.Module:
    """A CIFAR ResNet behind ImageNet's normalisation, as these weights were trained."""
    return load_weights(normalized(CifarResNet(depth), "imagenet"), weights)


def trainer(**arguments) -> Trainer:
    """One that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", callbacks=[ChannelsLast()], enable_model_summary=False, **quiet, **arguments)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=None)
    parser.add_argument("--xi", type=float, nargs="+", default=[10.0], help="in 1/255")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--validation-images", type=int, default=1000)
    parser.add_argument("--validate-every", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collapse", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/universal_attacks"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    held_out = arguments.validation_images
    source = HuggingFaceDataModule(
        arguments.data, subset=arguments.images + held_out, validation=held_out, augmentation=None
    )
    data = Memory(source, arguments.batch_size, arguments.test_images)
    for seed in arguments.seeds:
        for xi in arguments.xi:
            for name in arguments.methods:
                kind, options = METHODS[name]
                seed_everything(seed, verbose=False)
                net = network(arguments.depth, arguments.weights)
                collapse = arguments.collapse and name == "fg"
                module = getattr(methods, kind)(net, 10, xi=xi / 255, seed=seed, neural_collapse=collapse, **options)
                given = ProxyImages(data, count=arguments.images) if name.endswith("jigsaw") else data
                epochs = 1 if name in ("random", "deepfool") else arguments.epochs
                every_n = min(arguments.validate_every, epochs)
                start, cpu = time.perf_counter(), time.process_time()
                if name != "random":
                    trainer(max_epochs=epochs, check_val_every_n_epoch=every_n).fit(module, datamodule=given)
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                (scores,) = trainer().test(module, datamodule=data, verbose=False)
                label = f"resnet{arguments.depth}_{name}_{arguments.images}_xi{xi:g}_seed{seed}"
                module.export(arguments.output / f"{label}.npz")
                module.export(arguments.output / f"{label}.png")
                settings = {"depth": arguments.depth, "method": name, "images": arguments.images, "xi": xi}
                line = settings | {"epochs": epochs, "seed": seed, "fit_seconds": seconds, "fit_cpu_seconds": cpu}
                with (arguments.output / "results.jsonl").open("a") as file:
                    file.write(json.dumps(line | scores) + "\n")
                shown = {key: round(scores[f"test_{key}"], 4) for key in ("fooling_ratio", "accuracy", "dominance_1")}
                print(label, shown, f"{cpu:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
