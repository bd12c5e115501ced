"""A row of a benchmark: the same work done in two ways, checked against each other and timed in turn."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import peak, seconds
from torch import Tensor, nn
from torch.optim import SGD

from torchlethe import models, updates

Batch = dict[str, Tensor]


@dataclass
class Comparison:
    """One row: two ways to do the same work.

    Attributes:
        title: what is measured.
        plain: does it in the straightforward way.
        ours: does the same with the library.
        difference: after one call of each from the start, the relative distance of their results.
        tolerance: largest distance that rounding explains.
        target: the ratio to reach on a CPU; 1 is "not slower".
        units: how many steps one call does.
        repeats: how often our side does it in one call, where a single time is too short for the clock.
        once: whether a call is so long that one round has to do.
    """

    title: str
    plain: Callable[[], object]
    ours: Callable[[], object]
    difference: Callable[[], float]
    tolerance: float = 2e-2
    target: float = 1.0
    units: int = 1
    repeats: int = 1
    once: bool = False


class Bench:
    """What the rows share: a network as both sides have it, and batches.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.size, self.device = options.batch_size, torch.device(options.device)
        torch.manual_seed(0)
        start = getattr(models, options.network)()
        with torch.no_grad():
            for _ in range(3):  # BatchNorm statistics other than those of the construction
                start(torch.rand(64, 3, 32, 32))
        self.start = start.to(self.device)
        self.plain, self.ours = copy.deepcopy(start), copy.deepcopy(start)
        if options.layout == "chosen" and self.device.type == "cpu":
            models.channels_last_on_cpu(self.ours)
        elif options.layout == "chosen":
            self.ours.to(memory_format=torch.channels_last)
        self.forget, self.remain = ([self.batch(), self.batch()] for _ in range(2))

    def batch(self, size: int | None = None) -> Batch:
        """Random images and labels."""
        n = size or self.size
        image, label = torch.rand(n, 3, 32, 32), torch.randint(10, (n,))
        return {
            "image": image.to(self.device),
            "label": label.to(self.device),
            "index": torch.arange(n).to(self.device),
        }

    def moved(self) -> float:
        """Distance of both networks relative to how far the plain one has come."""
        plain, own, start = (
            torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (self.plain, self.ours, self.start)
        )
        return float((plain - own).norm() / (plain - start).norm())

    def configured(self, rule: updates.UpdateRule) -> updates.UpdateRule:
        """Prepare a rule on our network; the network is in train mode afterwards."""
        rule.configure(self.ours)
        if isinstance(rule, updates.LossUpdate):
            rule.set_length(10**6, 10**6)
        roles = {"forget": self.forget, "remain": self.remain, "train": self.remain + self.forget}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rule.prepare(self.ours, roles)
        self.ours.train()
        return rule

    def steps(
        self,
        title: str,
        rule: updates.UpdateRule,
        plain: Callable[[], object],
        batches: list[Batch | dict[str, Batch]],
        target: float = 1.0,
        **keywords: float,
    ) -> Comparison:
        """A row whose calls do a step of a rule on each of the batches."""
        count = itertools.count()

        def ours() -> None:
            for batch in batches:
                rule.step(self.ours, batch, next(count))

        return Comparison(title, plain, ours, self.moved, units=len(batches), target=target, **keywords)


def distances(first: list[Tensor], second: list[Tensor]) -> float:
    """Relative distance of two lists of tensors."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (first, second))
    return float((a - b).norm() / a.norm())


def sgd(network: nn.Module) -> SGD:
    """The optimizer of the plain side."""
    return SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def measure(row: Comparison, device: torch.device, rounds: int) -> list[str]:
    """Check that both sides agree, then time them in turn; the cells of the row."""
    row.plain()
    row.ours()
    if (found := row.difference()) > row.tolerance:
        raise SystemExit(f"{row.title}: the two sides differ by {found:.3g}, relative.")
    # the call above has warmed up
    times = [(seconds(row.plain, device), seconds(row.ours, device)) for _ in range(1 if row.once else rounds)]
    times = [(plain / row.units, own / row.units / row.repeats) for plain, own in times]
    medians = [statistics.median(side) for side in zip(*times, strict=True)]
    ratio = statistics.median(plain / own for plain, own in times)
    memory = [float("nan")] * 2 if row.once else [peak(row.plain, device), peak(row.ours, device)]
    cells = [
        f"{1000 * t:.2f} ms" + ("" if math.isnan(m) else f", {m:.0f} MiB") for t, m in zip(medians, memory, strict=True)
    ]
    return [row.title, *cells, f"{ratio:.2f}×", f"{row.target:g}×"]
