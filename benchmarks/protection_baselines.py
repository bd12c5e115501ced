"""Baseline protections: how long autoregressive patterns take, and what a network learns from protected digits.

    python benchmarks/protection_baselines.py            # both parts, about five minutes on two cores
    python benchmarks/protection_baselines.py speed
    python benchmarks/protection_baselines.py digits --seeds 2 --only em ap_t

The second part reads the settings of the files in configs/digits, protects the 1200 training digits, trains a new
network on them by the recipe of configs/digits/appropriator.yaml and prints its accuracy on the 597 clean test digits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from torchlethe import lightning_modules
from torchlethe._cli.catalog import configs_folder
from torchlethe.datamodules import DigitsDataModule
from torchlethe.functional.autoregressive import autoregressive_pattern, draw_kernels, l2_scaled
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.models import Autoencoder, SmallCNN

CONFIGS = ["random_noise", "ap_t", "ap_u", "hypocritical", "tensor_clog", "em", "em_class", "rem"]
CONFIGS += ["deep_confuse", "lsp", "ar", "ops"]


def loop_pattern(kernel: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The recursion pixel by pixel for one image, as in the published code."""
    pattern = start.clone()
    for channel in range(pattern.shape[0]):
        for i in range(2, pattern.shape[1]):
            for j in range(2, pattern.shape[2]):
                around = pattern[channel, i - 2 : i + 1, j - 2 : j + 1]
                pattern[channel, i, j] = (kernel[channel] * around).sum()
    return pattern


def speed() -> None:
    """Autoregressive patterns for 32×32 colour images, in turn: batched, and one image after the other."""
    generator = torch.Generator().manual_seed(0)
    kernels = draw_kernels(10, 3, generator) * 0.5
    start = torch.randn(512, 3, 36, 36, dtype=torch.float64, generator=generator)
    label = torch.arange(512) % 10
    times: dict[str, list[float]] = {"batched": [], "loop": []}
    for _ in range(3):
        begin = time.perf_counter()
        batched = l2_scaled(autoregressive_pattern(kernels, label, start), 1.0, 4)[0]
        times["batched"].append((time.perf_counter() - begin) / len(start))
        begin = time.perf_counter()
        single = torch.stack([loop_pattern(kernels[label[k]], start[k]) for k in range(4)])
        times["loop"].append((time.perf_counter() - begin) / 4)
    worst = (l2_scaled(single, 1.0, 4)[0] - batched[:4]).abs().max()
    fast, slow = (sorted(values)[1] for values in times.values())
    print(f"autoregressive, 32x32x3, per image: batched {1e3 * fast:.3f} ms, loop {1e3 * slow:.1f} ms, ", end="")
    print(f"{slow / fast:.0f} times as fast, largest difference {worst:.1e}")


def train(image: torch.Tensor, label: torch.Tensor, seed: int, epochs: int = 30) -> SmallCNN:
    """30 epochs of SGD with a cosine schedule."""
    torch.manual_seed(seed)
    network = SmallCNN(num_classes=10, in_channels=1, image_size=8, pooled=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(image), generator=generator).split(64):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(image[rows].float() / 255), label[rows]).backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def module_of(name: str, owner: SmallCNN) -> ProtectionModule:
    """The protection of a file in configs/digits; networks are replaced by the owner's."""
    model: dict[str, Any] = yaml.safe_load((configs_folder() / "digits" / f"{name}.yaml").read_text())["model"]
    arguments = dict(model["init_args"])
    if "network" in arguments:
        arguments["network"] = owner
    if "generator" in arguments:
        arguments["generator"] = Autoencoder(**arguments["generator"]["init_args"])
    return getattr(lightning_modules, model["class_path"])(**arguments)


def digits(names: list[str], seeds: int) -> None:
    """Accuracy of networks trained on protected digits, on clean test images."""
    data = DigitsDataModule()
    data.setup()
    train_set, test_set = data.train_set[range(1200)], data.test_set[range(597)]
    batches = [{name: value[k : k + 600] for name, value in train_set.items()} for k in (0, 600)]

    def judged(image: torch.Tensor) -> str:
        found = []
        for seed in range(seeds):
            network = train(image, train_set["label"], 100 + seed)
            with torch.no_grad():
                right = network(test_set["image"].float() / 255).argmax(1) == test_set["label"]
            found.append(f"{float(right.float().mean()):.3f}")
        return " ".join(found)

    print(f"| protection | accuracy ({seeds} seeds) | seconds to protect | largest and mean change (of 255) |")
    print(f"| --- | --- | --- | --- |\n| none | {judged(train_set['image'])} | | |", flush=True)
    owner = train(train_set["image"], train_set["label"], 0)
    for name in names:
        protection = module_of(name, owner).protection
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logs = protection.prepare(batches, device="cpu")
        parts = [protection.protect(batch["image"], batch["label"], batch["index"]) for batch in batches]
        seconds = time.perf_counter() - begin
        image = torch.cat(parts)
        change = (image.int() - train_set["image"].int()).abs()
        remarks = ", ".join(f"{key} {value:.3g}" for key, value in logs.items())
        print(
            f"| {name} | {judged(image)} | {seconds:.1f} | {int(change.max())}, {float(change.float().mean()):.1f} | "
            f"{remarks}",
            flush=True,
        )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=Path(__file__).stem)
    parser.add_argument("part", nargs="?", choices=("speed", "digits"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=CONFIGS, choices=CONFIGS)
    options = parser.parse_args()
    if options.part != "digits":
        speed()
    if options.part != "speed":
        digits(options.only, options.seeds)


if __name__ == "__main__":
    main()
