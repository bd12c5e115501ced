"""Time of NatMU's draw of partners against the straightforward formulations of the same draw, all sides in turn.

One goes hybrid by hybrid and picks a random image of the demanded class that is not used yet; the other, which is the
published way, shuffles all remaining images until each falls on a demand for its class. The script checks that every
side's partners have the demanded classes and are distinct before it reports a ratio.

    python benchmarks/natmu_pairing.py --rounds 3
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchlethe.data.hybrids import shuffled
from torchlethe.functional.pairing import deal_partners, rejection_partners

CASES = {
    "CIFAR-10, 1 %": (10, 49_500, 500),
    "CIFAR-100, 1 %": (100, 49_500, 500),
    "CIFAR-10, 10 %": (10, 45_000, 5_000),
    "CIFAR-100, 10 %": (100, 45_000, 5_000),
}


def image_by_image(demand: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each hybrid one of the unused remaining images of its class."""
    unused = torch.ones(len(labels), dtype=torch.bool)
    partners = []
    for wanted in demand.tolist():
        candidates = ((labels == wanted) & unused).nonzero().flatten()
        partner = int(candidates[torch.randint(len(candidates), (), generator=generator)])
        unused[partner] = False
        partners.append(partner)
    return torch.tensor(partners)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hybrids", type=int, default=4, help="hybrids of each forget image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "image by image": lambda demand, labels: image_by_image(demand, labels, generator),
        "rejection": lambda demand, labels: rejection_partners(
            demand, labels, lambda cards: shuffled(cards, generator)
        ),
        "dealt": lambda demand, labels: deal_partners(demand, labels, lambda cards: shuffled(cards, generator)),
    }
    table = Table(title="milliseconds")
    for column in ("", "hybrids", *sides, "ratios"):
        table.add_column(column, no_wrap=True)
    for case, (classes, remain, forget) in CASES.items():
        labels = torch.randint(classes, (remain,), generator=generator)
        demand = torch.rand(forget, classes, generator=generator).topk(options.hybrids).indices.flatten()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, draw in sides.items():
                # the fast side often enough for the clock
                repeats = 20 if name == "dealt" else 1
                start = time.perf_counter()
                for _ in range(repeats):
                    partners = draw(demand, labels)
                seconds[name].append((time.perf_counter() - start) / repeats)
                if not torch.equal(labels[partners], demand) or len(partners.unique()) < len(demand):
                    raise SystemExit(f"{name} drew wrong partners in {case}.")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        cells = [f"{1000 * value:.1f}" for value in medians.values()]
        ratios = [f"{medians[name] / medians['dealt']:.0f}×" for name in ("image by image", "rejection")]
        table.add_row(case, str(len(demand)), *cells, " and ".join(ratios))
    Console().print(table)
    Console().print(f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, {options.rounds} rounds in turn")


if __name__ == "__main__":
    main()
