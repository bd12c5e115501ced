"""Hessian metrics: Lanczos against power iteration, and probes that share a first derivative against single ones.

Run ``python benchmarks/sharpness_metrics.py [--samples 512]``. A small CNN is trained on digits for a few epochs with
label noise; both ways of each pair then take turns on the same samples in one process. Power iteration stops when its
estimate changes by less than 1e-3 of itself, Lanczos by its default tolerance.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from torchlethe.data import SymmetricNoise
from torchlethe.datamodules import DigitsDataModule
from torchlethe.functional import MeanLoss, hessian_top_eigenvalues, hessian_trace
from torchlethe.models import SmallCNN


def trained(samples: int, epochs: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The network and the samples."""
    data = DigitsDataModule(label_noise=SymmetricNoise(0.4), augmentation=None)
    data.setup()
    assert data.train_set is not None
    batch = data.prepare_batch(data.train_set[list(range(samples))])
    batches = list(zip(batch["image"].split(64), batch["label"].split(64), strict=True))
    torch.manual_seed(0)
    network = SmallCNN(in_channels=1, image_size=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for image, label in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(image), label).backward()
            optimizer.step()
    return network, batches


def power_iteration(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """The eigenvalue of largest magnitude, and the number of products."""
    mean_loss = MeanLoss(network, batches)
    vector = torch.randn(mean_loss.size, generator=torch.Generator().manual_seed(0))
    value, sweeps = float("nan"), 0
    while True:
        vector = vector / vector.norm()
        product = mean_loss.hessian_product(vector)
        before, value, sweeps = value, float(vector @ product), sweeps + 1
        if abs(value - before) <= 1e-3 * abs(before) or sweeps == 100:
            return value, sweeps
        vector = product


def timed(function: Callable[[], tuple[float, int]]) -> tuple[float, tuple[float, int]]:
    """Processor time and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    """Print median processor times, sweeps and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network, batches = trained(arguments.samples, arguments.epochs)
    exact = hessian_top_eigenvalues(network, batches, tolerance=1e-5).values.item()

    def lanczos() -> tuple[float, int]:
        found = hessian_top_eigenvalues(network, batches)
        return found.values.item(), found.sweeps

    def trace(together: int) -> tuple[float, int]:
        value = hessian_trace(network, batches, arguments.probes, together=together).value.item()
        return value, -(-arguments.probes // together)

    pairs: list[tuple[str, Callable[[], tuple[float, int]]]] = [
        ("λ max, power iteration", lambda: power_iteration(network, batches)),
        ("λ max, Lanczos", lanczos),
        ("trace, one by one", lambda: trace(1)),
        ("trace, 8 together", lambda: trace(8)),
    ]
    print(f"{arguments.samples} samples, {sum(p.numel() for p in network.parameters())} parameters, one thread")
    rounds = [[timed(function) for _, function in pairs] for _ in range(arguments.rounds)]
    for (title, _), runs in zip(pairs, zip(*rounds, strict=True), strict=True):
        spent, (value, sweeps) = median(seconds for seconds, _ in runs), runs[0][1]
        error = f"  relative error {abs(value / exact - 1):.0e}" if "max" in title else ""
        print(f"{title:24s} {spent:7.2f} s  {sweeps:3d} sweeps  value {value:.5g}{error}")


if __name__ == "__main__":
    main()
