"""Time of SFRon's iterations against a straightforward formulation of the same update, both sides in turn.

The other side does what the published loop does: it copies the network before every iteration for a slow update that is
switched off, moves the mask to the device parameter by parameter in every forgetting step, and accumulates the Fisher
information on the CPU parameter by parameter. Both start from the same weights and see the same batches; the script
checks that they end in the same weights before it reports a ratio.

    python benchmarks/sfron_step.py --network resnet18 --device cuda --batch-size 128
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
import time
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from torchlethe import models
from torchlethe.updates import SFRonUpdate

Batches = list[dict[str, Tensor]]
STEPS, EVERY, ALPHA, LAM, CLIP, GAMMA = 10, 5, 25.0, 0.5, 7.0, 1.0


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock measures work and not its announcement."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def straightforward_fisher(network: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Squared batch gradients, moved to the CPU parameter by parameter."""
    network.eval()
    fisher = {name: torch.zeros_like(p, device="cpu") for name, p in network.named_parameters()}
    for batch in batches:
        network.zero_grad()
        nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        for name, p in network.named_parameters():
            fisher[name] += (p.grad**2).cpu() / len(batches)
    return fisher


def straightforward(network: nn.Module, loaders: dict[str, Batches], device: torch.device) -> tuple[float, float]:
    """Run the plain formulation; returns the seconds of preparation and of the loop."""
    synchronize(device)
    start = time.perf_counter()
    forget, remain = (straightforward_fisher(network, loaders[role]) for role in ("forget", "remain"))
    mask = {name: ((forget[name] + 1e-15) / (remain[name] + 1e-15) >= GAMMA).float() for name in forget}
    synchronize(device)
    prepared = time.perf_counter()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    forgets, remains = cycle(loaders["forget"]), cycle(loaders["remain"])
    network.train()
    for k in range(STEPS):
        previous = copy.deepcopy(network)
        factor = (1 + math.cos(math.pi * k / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        if k % EVERY == 0:
            batch = next(forgets)
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(network(batch["image"]), batch["label"], reduction="none")
            weights = 1 / (losses.detach().clamp_min(1e-6) ** LAM + 1e-15)
            (-ALPHA * factor * (weights / weights.sum() * losses).sum()).backward()
            for name, p in network.named_parameters():
                p.grad *= mask[name].to(device)
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
        batch = next(remains)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(network.parameters(), previous.parameters(), strict=True):
                p.copy_(1.0 * p + 0.0 * old)
    synchronize(device)
    return prepared - start, time.perf_counter() - prepared


def ours(network: nn.Module, loaders: dict[str, Batches], device: torch.device) -> tuple[float, float]:
    """Run the update rule; returns the seconds of preparation and of the loop."""
    rule = SFRonUpdate(steps=STEPS, forget_every=EVERY)
    rule.configure(network)
    synchronize(device)
    start = time.perf_counter()
    rule.prepare(network, loaders)
    synchronize(device)
    prepared = time.perf_counter()
    forgets, remains = cycle(loaders["forget"]), cycle(loaders["remain"])
    network.train()
    for k in range(STEPS):
        batch = {"remain": next(remains)} | ({"forget": next(forgets)} if k % EVERY == 0 else {})
        rule.step(network, batch, k)
    synchronize(device)
    return prepared - start, time.perf_counter() - prepared


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20", help="name in torchlethe.models (default: resnet20)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=5, help="batches of each role in the preparation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="the update rule's network gets this layout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(0)
    start = getattr(models, options.network)().to(device)
    size = options.batch_size
    loaders: dict[str, Batches] = {
        role: [
            {"image": torch.rand(size, 3, 32, 32, device=device), "label": torch.randint(10, (size,), device=device)}
            for _ in range(options.batches)
        ]
        for role in ("forget", "remain")
    }
    seconds: dict[str, list[tuple[float, float]]] = {"straightforward": [], "update rule": []}
    for round_ in range(options.rounds + 1):
        networks = {name: copy.deepcopy(start) for name in seconds}
        if options.channels_last:
            networks["update rule"].to(memory_format=torch.channels_last)
        for name, run in (("straightforward", straightforward), ("update rule", ours)):
            times = run(networks[name], loaders, device)
            # the first round warms up caches and kernels
            if round_:
                seconds[name].append(times)
        # rounding may flip the mask of a weight whose ratio is at the threshold: the whole displacement is compared
        plain, own, origin = (
            torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (*networks.values(), start)
        )
        difference = float((plain - own).norm() / (plain - origin).norm())
        if difference > 0.05:
            raise SystemExit(f"the two sides moved the weights differently: relative distance {difference:.3f}.")
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in seconds.items()
    }
    table = Table("", "preparation / s", "iteration / ms", title=f"SFRon, {options.network}, batches of {size}")
    for name, (prepare, loop) in medians.items():
        table.add_row(name, f"{prepare:.3f}", f"{1000 * loop / STEPS:.1f}")
    base, own = medians["straightforward"], medians["update rule"]
    table.add_row("ratio", f"{base[0] / own[0]:.2f}×", f"{base[1] / own[1]:.2f}×")
    Console().print(table)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    Console().print(
        f"{hardware}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds in turn"
    )


if __name__ == "__main__":
    main()
