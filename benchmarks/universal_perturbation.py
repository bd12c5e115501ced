"""FG-UAP with its validation: the straightforward formulation against the module, in turn, same batches, same v.

python benchmarks/universal_perturbation.py --rounds 3

Straightforward is the official loop: for each batch a pass over the clean images, one over the perturbed ones and a
backward pass; after each epoch both passes over all validation images. The module asks the network about clean images
once, folds BatchNorm into convolutions and runs channels-last; ``selection`` also selects on a tenth of the images, as
it is told to in docs/universal_perturbations.md. CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from torchlethe.callbacks import ChannelsLast
from torchlethe.components import UniversalNoise
from torchlethe.data import InMemoryImages
from torchlethe.datamodules import ImageDataModule
from torchlethe.lightning_modules import FeatureGatheringUAP
from torchlethe.models import CifarResNet, normalized


class Noise(ImageDataModule):
    """Random images of CIFAR's size: speed does not depend on what they show."""

    num_classes = 10

    def __init__(self, train: int, validation: int) -> None:
        super().__init__(batch_size=32, eval_batch_size=250, augmentation=None)
        generator = torch.Generator().manual_seed(0)

        def images(count: int) -> InMemoryImages:
            pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
            return InMemoryImages(pixels, torch.arange(count) % 10)

        self.train_set, self.validation_set = images(train), images(validation)
        self.test_set = self.validation_set


def network() -> torch.nn.Module:
    """The same ResNet-20 for both."""
    torch.manual_seed(0)
    return normalized(CifarResNet(20), "imagenet")


def straightforward(data: Noise, epochs: int) -> torch.Tensor:
    """The official loop, with the seeded start and the clamp of the module."""
    model = network().eval().requires_grad_(False)
    seen: list[torch.Tensor] = []
    model.network.linear.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].clone()))
    noise = UniversalNoise((3, 32, 32), 10 / 255)
    optimizer = torch.optim.Adam([noise.v], lr=0.02, weight_decay=1e-5)
    loader = data.train_dataloader()
    for _ in range(epochs):
        for batch in loader:
            image = batch["image"].float() / 255
            seen.clear()
            model(image)
            model((image + noise.v).clamp(0, 1))
            optimizer.zero_grad()
            F.cosine_similarity(seen[1], seen[0].detach()).mean().backward()
            optimizer.step()
            noise.project_()
        fooled = total = 0
        for batch in data.val_dataloader():
            image = batch["image"].float() / 255
            with torch.no_grad():
                fooled += int((model((image + noise.v).clamp(0, 1)).argmax(1) != model(image).argmax(1)).sum())
            total += len(image)
    return noise.v.detach()


def module(data: Noise, epochs: int) -> torch.Tensor:
    """The module in a Trainer, its start included."""
    attack = FeatureGatheringUAP(network(), 10)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[ChannelsLast()], enable_model_summary=False, **quiet
    )
    trainer.fit(attack, datamodule=data)
    return attack.noise.v.detach()


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--validation", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_printoptions(precision=2)
    whole, tenth = (Noise(arguments.train, count) for count in (arguments.validation, arguments.validation // 10))
    module(Noise(32, 32), 1)  # imports and first allocations
    sides = {"straightforward": (straightforward, whole), "module": (module, whole), "selection": (module, tenth)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, torch.Tensor] = {}
    for _ in range(arguments.rounds):
        for name, (run, data) in sides.items():
            start = time.process_time()
            last[name] = run(data, arguments.epochs)
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        apart = float((last[name] - last["straightforward"]).abs().mean())
        ratio = medians["straightforward"] / seconds
        print(f"{name:16} {seconds:7.2f} s  {ratio:5.2f}x  mean |v - v straightforward| {apart:.1e}")


if __name__ == "__main__":
    main()
