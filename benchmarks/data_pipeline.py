"""Images per second of Lethe's loader with batched augmentation, against the usual per-image pipeline.

Both give shuffled, cropped (4 pixels of padding) and mirrored float batches in [0, 1] on the CPU. The usual pipeline is
a torchvision data set with PIL transforms in a DataLoader; it runs with every number of workers asked for and its best
counts. Rounds alternate, so that a busy machine slows both down.

    python benchmarks/data_pipeline.py --rounds 3
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset
from torchvision.transforms.functional import to_pil_image

from torchlethe.data import Augmentation, InMemoryImages, PositionedLoader


class PerImage(VisionDataset):
    """What torchvision's CIFAR-10 does for each image: array to PIL, then the transforms."""

    def __init__(self, images: np.ndarray, labels: list[int], transform: Callable) -> None:
        super().__init__("", transform=transform)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return self.transform(to_pil_image(self.images[position])), self.labels[position]


def images_per_second(batches: Callable) -> float:
    """Time one pass."""
    start, count = time.perf_counter(), 0
    for image in batches():
        count += len(image)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000, help="synthetic images in the data set")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="workers the usual pipeline may use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch per process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    shape = (arguments.images, 3, arguments.size, arguments.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(arguments.images) % 10

    loader = PositionedLoader(InMemoryImages(pixels, labels), arguments.batch_size, shuffle=True)
    augment = Augmentation(crop=4, flip=True)

    def ours():
        for batch in loader:
            yield augment(batch["image"], batch["index"], batch["epoch"]).float().div_(255)

    transform = transforms.Compose(
        [transforms.RandomCrop(arguments.size, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    per_image = PerImage(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transform)

    def usual(workers: int) -> Callable:
        made = DataLoader(
            per_image, arguments.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: (image for image, _ in made)

    contestants = {"lethe, 0 workers": ours}
    contestants |= {f"per-image PIL, {workers} workers": usual(workers) for workers in arguments.workers}
    for batches in contestants.values():  # warm up, start workers
        next(iter(batches()))
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, batches in contestants.items():
            rates[name].append(images_per_second(batches))

    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ", end="")
    print(f"{arguments.threads} thread(s); {arguments.images} images {shape[1:]}, batches of {arguments.batch_size}\n")
    print("| pipeline | images/s (median) | slowest | fastest |\n| --- | ---: | ---: | ---: |")
    for name, values in rates.items():
        print(f"| {name} | {median[name]:,.0f} | {min(values):,.0f} | {max(values):,.0f} |")
    best = max((name for name in median if name != "lethe, 0 workers"), key=median.__getitem__)
    print(f"\nratio to the best usual pipeline ({best}): {median['lethe, 0 workers'] / median[best]:.1f}x")


if __name__ == "__main__":
    main()
