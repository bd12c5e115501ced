"""Time and peak memory of unlearning steps against a straightforward formulation of the same update, both in turn.

Each method is a function in ``METHODS`` that returns a :class:`Comparison`: the plain side, ours, and a measure of how
far apart their results are. A ratio is printed only where both sides computed the same.

    python benchmarks/unlearning.py --methods mu_mis --network resnet20 --batch-size 64
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from torchlethe import models
from torchlethe.updates import MUMisUpdate


@dataclass
class Comparison:
    """One section: two ways to do the same work.

    Attributes:
        title: what is measured, with the unit of work.
        against: what the plain side does.
        plain: does one unit of work in the straightforward way.
        ours: does the same with the library.
        difference: after one call of each from the start, the relative distance of their results.
        tolerance: largest distance that rounding explains.
        target: the ratio to reach on a CPU.
    """

    title: str
    against: str
    plain: Callable[[], None]
    ours: Callable[[], None]
    difference: Callable[[], float]
    tolerance: float
    target: float


def warm_network(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """A network whose BatchNorm statistics are not those of its construction."""
    torch.manual_seed(0)
    network = getattr(models, options.network)()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(64, 3, 32, 32))
    return network.to(device)


def random_batch(size: int, device: torch.device) -> dict[str, Tensor]:
    """Random images and labels."""
    image, label = torch.rand(size, 3, 32, 32), torch.randint(10, (size,))
    return {"image": image.to(device), "label": label.to(device), "index": torch.arange(size, device=device)}


def displacement(networks: list[nn.Module], start: nn.Module) -> float:
    """Distance of two networks relative to how far the first has come."""
    first, second, origin = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (*networks, start))
    return float((first - second).norm() / (first - origin).norm())


def mu_mis(options: argparse.Namespace, device: torch.device) -> Comparison:
    """A step of MU-Mis: two input gradients with a graph, then backward through both; BatchNorm in eval mode."""
    start, batch = warm_network(options, device), random_batch(options.batch_size, device)
    plain_network, network = copy.deepcopy(start), copy.deepcopy(start)
    rule = MUMisUpdate(
        steps=10**9,
        min_dip=1.0,
        monitor_every=10**9,
        monitor_samples=options.batch_size,
        irrelevant_sampling="fixed",
    )
    rule.configure(network)
    rule.prepare(network, {"forget": [batch]})
    other = rule._other_classes(torch.zeros(len(batch["label"]), 10), batch["label"], batch["index"], 0).squeeze(1)
    optimizer = torch.optim.SGD(plain_network.parameters(), lr=rule.optimizers[0].param_groups[0]["lr"])
    plain_network.eval()

    def plain() -> None:
        image = batch["image"].clone().requires_grad_()
        logits = plain_network(image)
        rows = torch.arange(len(image), device=device)
        target, irrelevant = (logits[rows, classes].sum() for classes in (batch["label"], other))
        (g1,) = torch.autograd.grad(target, image, create_graph=True, retain_graph=True)
        (g2,) = torch.autograd.grad(irrelevant, image, create_graph=True)
        optimizer.zero_grad()
        (((g1**2).sum() - (g2**2).sum()) / len(image)).backward()
        optimizer.step()

    return Comparison(
        title="MU-Mis, step",
        against="two autograd.grad(create_graph=True) and a backward pass through BatchNorm in eval mode",
        plain=plain,
        ours=lambda: rule.step(network, batch, 0) and None,
        difference=lambda: displacement([plain_network, network], start),
        tolerance=1e-2,
        target=1.25,
    )


METHODS: dict[str, Callable[[argparse.Namespace, torch.device], Comparison]] = {"mu_mis": mu_mis}


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall clock on a GPU; on a CPU its time, so that other programs on the machine do not count."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak(work: Callable[[], None], device: torch.device) -> float:
    """MiB that one call needs at most beyond what was held before: of the allocator, on a CPU of resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = resident("VmRSS") if reset_peak() else float("nan")
    work()
    return (resident("VmHWM") - before) / 1024


def reset_peak() -> bool:
    """Give unused memory back and start a new peak; false where the system cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> float:
    """A line of /proc/self/status in KiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--network", default="resnet20", help="name in torchlethe.models (default: resnet20)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    table = Table(
        "", "plain", "ours", "ratio", "target (CPU)", title=f"{options.network}, batches of {options.batch_size}"
    )
    for name in options.methods:
        comparison = METHODS[name](options, device)
        # the first round warms up, and is the one after which both sides can be compared
        comparison.plain()
        comparison.ours()
        if (found := comparison.difference()) > comparison.tolerance:
            raise SystemExit(f"{comparison.title}: the two sides differ by {found:.3g}, relative.")
        rounds = [(seconds(comparison.plain, device), seconds(comparison.ours, device)) for _ in range(options.rounds)]
        times = [statistics.median(side) for side in zip(*rounds, strict=True)]
        ratio = statistics.median(plain / ours for plain, ours in rounds)
        memory = (peak(comparison.plain, device), peak(comparison.ours, device))
        cells = [f"{1000 * t:.1f} ms, {m:.0f} MiB" for t, m in zip(times, memory, strict=True)]
        table.add_row(comparison.title, *cells, f"{ratio:.2f}×", f"{comparison.target:.2f}×")
    Console().print(table)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    Console().print(
        f"{hardware}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds in turn"
    )


if __name__ == "__main__":
    main()
