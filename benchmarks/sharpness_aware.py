"""What F-SAM costs beyond its two passes, against a formulation that goes tensor by tensor, all sides in turn.

Three tables a network: everything outside forward and backward (climb, way back and base step) in milliseconds and
dispatched operations; whole steps in units of two forward and backward passes, in a plain loop and under a Lightning
Trainer; memory in units of the network's parameters. The other side does what the published loop does: it copies
gradients and weights, averages, scales and perturbs one parameter at a time, and puts the copy of the weights in their
place. Both sides get the same gradients; the script checks that they end in the same weights.

    python benchmarks/sharpness_aware.py                               # minutes on a CPU
    python benchmarks/sharpness_aware.py --quick
    python benchmarks/sharpness_aware.py --device cuda --bf16
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from torchlethe import models
from torchlethe.callbacks import SharpnessAware
from torchlethe.optimizers import FriendlySAM

NETWORKS = {"ResNet-20": "resnet20", "ViT-Ti": "vit_tiny", "ResNet-18": "resnet18"}
RHO, LAMBDA = 0.1, 0.6
BASE: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
KINDS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
Batch = tuple[Tensor, Tensor]


class Reference(torch.optim.Optimizer):
    """F-SAM one tensor at a time: every quantity a new tensor, the saved weights put in place of the perturbed ones."""

    def __init__(self, params: Any, **base: Any) -> None:
        self.base = torch.optim.SGD(params, **base)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups = self.base.param_groups

    def _params(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Direction and average, norm, climb."""
        for p in self._params():
            gradient, state = p.grad.clone(), self.state[p]
            if "average" in state:
                p.grad -= state["average"] * 1.0
                state["average"] = state["average"] * LAMBDA + gradient * (1 - LAMBDA)
            else:
                state["average"] = gradient
        norm = torch.stack([(1.0 * p.grad).norm(p=2) for p in self._params()]).norm(p=2)
        scale = RHO / (norm + 1e-12)
        for p in self._params():
            self.state[p]["weights"] = p.data.clone()
            p.add_(1.0 * p.grad * scale.to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to the weights, base step."""
        for p in self._params():
            p.data = self.state[p]["weights"]
        self.base.step()
        if zero_grad:
            self.zero_grad()


class Operations(TorchDispatchMode):
    """Counts the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


class Clock:
    """Milliseconds of blocks: processor time on a CPU, where others work too, the time between events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.milliseconds = 0.0

    def start(self) -> None:
        """Begin a block."""
        if self.cuda:
            torch.cuda.synchronize()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        else:
            self.begun = time.process_time_ns()

    def stop(self) -> None:
        """End a block and add it."""
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
            self.milliseconds += self.events[0].elapsed_time(self.events[1])
        else:
            self.milliseconds += (time.process_time_ns() - self.begun) / 1e6


def friendly(network: nn.Module, kind: str) -> FriendlySAM:
    """Our optimizer around one of torch's three implementations of SGD."""
    return FriendlySAM(
        network.parameters(), torch.optim.SGD, rho=RHO, lmbda=LAMBDA, module=network, **BASE, **KINDS[kind]
    )


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A value of each side in each round; one round before warms up caches and kernels."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            value = run()
            if round_:
                found[name].append(value)
    return found


def optimizer_part(network: nn.Module, device: torch.device, rounds: int, title: str) -> Table:
    """Everything outside forward and backward."""
    generator = torch.Generator().manual_seed(0)
    gradients = [
        [(1e-3 * torch.randn(p.shape, generator=generator)).to(device) for p in network.parameters()] for _ in range(4)
    ]
    networks: dict[str, nn.Module] = {}
    sides: dict[str, Callable[[], float]] = {}
    counts: dict[str, int] = {}

    def add(name: str, make: Callable[[nn.Module], Any], passes: int) -> None:
        own = networks[name] = copy.deepcopy(network)
        optimizer, drawn = make(own), iter(range(10**9))

        def run(operations: Operations | None = None) -> float:
            clock = Clock(device)
            steps = [optimizer.first_step, optimizer.second_step] if passes == 2 else [optimizer.step]
            for step in steps:
                # the gradients are held here, as to free them belongs to the passes
                held = [gradient.clone() for gradient in gradients[next(drawn) % len(gradients)]]
                for p, gradient in zip(own.parameters(), held, strict=True):
                    p.grad = gradient
                with operations or contextlib.nullcontext():
                    clock.start()
                    step()
                    optimizer.zero_grad()
                    clock.stop()
            return clock.milliseconds

        sides[name] = run
        counts[name] = 0
        for _ in range(2):  # the first step makes the buffers
            operations = Operations()
            run(operations)
            counts[name] = operations.count

    for kind, options in KINDS.items():
        add(f"SGD, {kind}", lambda own, o=options: torch.optim.SGD(own.parameters(), **BASE, **o), 1)
    add("tensor by tensor, SGD default", lambda own: Reference(own.parameters(), **BASE), 2)
    for kind in KINDS:
        add(f"FriendlySAM, SGD {kind}", lambda own, k=kind: friendly(own, k), 2)
    found = {name: statistics.median(values) for name, values in in_turn(sides, rounds).items()}

    start, theirs, ours = (
        torch.cat([p.detach().flatten() for p in n.parameters()])
        for n in (network, networks["tensor by tensor, SGD default"], networks["FriendlySAM, SGD default"])
    )
    if not (difference := float((theirs - ours).norm() / (theirs - start).norm())) < 1e-3:
        raise SystemExit(f"the two sides moved the weights differently: relative distance {difference:.2g}.")

    plain, reference = found["SGD, default"], found["tensor by tensor, SGD default"]
    columns = (
        "",
        "ms",
        "× cheaper",
        "over its SGD / ms",
        "× cheaper",
        "over SGD default / ms",
        "× cheaper",
        "operations",
    )
    table = Table(*columns, title=f"{title}: outside forward and backward")
    for name, value in found.items():
        cells = [f"{value:.2f}"]
        if "SGD, " in name:
            cells += [""] * 5
        else:
            own = found[f"SGD, {name.split()[-1]}"]
            for base in (0.0, own, plain):
                above, most = value - base, reference - (plain if base else 0.0)
                cells += [f"{above:.2f}"] if base else []
                cells += [f"{most / above:.1f}" if above > 0 else "∞"]
        table.add_row(name, *cells, str(counts[name]))
    return table


class Task(LightningModule):
    """A network, cross-entropy, SGD."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused SGD."""
        return torch.optim.SGD(self.parameters(), **BASE, fused=True)


class Timing(Callback):
    """Time from the start of one step to the end of a fit."""

    def __init__(self, clock: Clock, first: int) -> None:
        self.clock, self.first = clock, first

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start where warming up ends."""
        if trainer.global_step == self.first:
            self.clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step."""
        if trainer.global_step == trainer.max_steps:
            self.clock.stop()


def step_time(
    network: nn.Module, batch: Batch, device: torch.device, bf16: bool, rounds: int, steps: int, title: str
) -> Table:
    """Whole steps, over the floor of two forward and backward passes."""
    image, label = batch

    def passes(own: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(own(image), label)
        loss.backward()
        return loss

    def repeated(step: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            step()
            clock = Clock(device)
            clock.start()
            for _ in range(steps):
                step()
            clock.stop()
            return clock.milliseconds / steps

        return run

    def floor() -> Callable[[], Any]:
        own = copy.deepcopy(network)

        def step() -> None:
            for _ in range(2):
                own.zero_grad()
                passes(own)

        return step

    def by_tensor() -> Callable[[], Any]:
        own = copy.deepcopy(network)
        optimizer = Reference(own.parameters(), **BASE)
        layers = [m for m in own.modules() if isinstance(m, nn.BatchNorm2d)]

        def step() -> None:
            passes(own)
            optimizer.first_step(zero_grad=True)
            for layer in layers:
                layer.backup, layer.momentum = layer.momentum, 0
            passes(own)
            for layer in layers:
                layer.momentum = layer.backup
            optimizer.second_step(zero_grad=True)

        return step

    def plain(kind: str) -> Callable[[], Any]:
        own = copy.deepcopy(network)
        optimizer = friendly(own, kind)

        def closure() -> Tensor:
            optimizer.zero_grad()
            return passes(own)

        return lambda: optimizer.step(closure)

    def trained(method: dict[str, Any] | None) -> Callable[[], float]:
        module = Task(copy.deepcopy(network))

        def run() -> float:
            clock, warm = Clock(device), 2
            callbacks: list[Callback] = [Timing(clock, warm)]
            if method is not None:
                callbacks.append(SharpnessAware(**method))
            trainer = Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed" if bf16 else "32-true",
                max_steps=steps + warm,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader([batch] * (steps + warm), batch_size=None))
            module.to(device)
            return clock.milliseconds / steps

        return run

    fsam = {"method": "fsam", "rho": RHO, "lmbda": LAMBDA}
    sides = {
        "two passes": repeated(floor()),
        "tensor by tensor": repeated(by_tensor()),
        "FriendlySAM, SGD foreach": repeated(plain("foreach")),
        "FriendlySAM, SGD fused": repeated(plain("fused")),
        "Trainer, SGD fused": trained(None),
        "Trainer, SharpnessAware": trained(fsam),
        "the same, perturb=norm_only": trained(fsam | {"perturb": "norm_only"}),
        "the same, ascent_fraction=0.5": trained(fsam | {"ascent_fraction": 0.5}),
        "the same, interval=2": trained(fsam | {"interval": 2}),
    }
    found = in_turn(sides, rounds)
    table = Table("", "step / ms", "× two passes", title=f"{title}: whole steps in batches of {len(label)}")
    for name, values in found.items():
        ratios = [value / base for value, base in zip(values, found["two passes"], strict=True)]
        table.add_row(name, f"{statistics.median(values):.1f}", f"{statistics.median(ratios):.3f}")
    return table


def alive(device: torch.device) -> int:
    """Bytes of all floating-point tensors that are alive, each memory once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.device.type == device.type and found.is_floating_point():
            storage = found.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def memory(network: nn.Module, batch: Batch, device: torch.device, bf16: bool, title: str) -> Table:
    """Buffers beyond the weights, between steps and when the second pass begins; on a GPU the peak too."""
    image, label = batch
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    columns = ["", "between steps", "in the second pass"] + (["peak / MiB"] if device.type == "cuda" else [])
    table = Table(*columns, title=f"{title}: buffers, in the size of its {models.parameter_count(network):,} weights")

    def add(name: str, make: Callable[[nn.Module], Any], two: bool) -> None:
        own = copy.deepcopy(network)
        before = alive(device)
        optimizer = make(own)
        inside = 0

        def passes() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(own(image), label)
            loss.backward()

        for step in range(3):
            if device.type == "cuda" and step == 2:
                torch.cuda.reset_peak_memory_stats()
            passes()
            if two:
                optimizer.first_step(zero_grad=True)
                inside = alive(device) - before if step == 1 else inside
                passes()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step()
                optimizer.zero_grad()
        cells = [f"{(alive(device) - before) / weights:.2f}", f"{inside / weights:.2f}" if two else ""]
        if device.type == "cuda":
            cells.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f}")
        table.add_row(name, *cells)

    def halved(own: nn.Module) -> FriendlySAM:
        return FriendlySAM(own.parameters(), torch.optim.SGD, RHO, lmbda=LAMBDA, memory_dtype=torch.bfloat16, **BASE)

    add("SGD", lambda own: torch.optim.SGD(own.parameters(), **BASE), False)
    add("tensor by tensor", lambda own: Reference(own.parameters(), **BASE), True)
    add("FriendlySAM", lambda own: friendly(own, "default"), True)
    add("FriendlySAM, average in bfloat16", halved, True)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in forward and backward")
    parser.add_argument("--batch-size", type=int, help="default: 128 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of whole steps; five times as many of the rest")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round, an even number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ResNet-20, batches of 4, three rounds")
    options = parser.parse_args()
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps is {options.steps}, it must be an even number, as interval=2 alternates.")
    if options.quick:
        options.networks, options.batch_size, options.rounds, options.steps = ["ResNet-20"], 4, 3, 2
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    size = options.batch_size or (128 if device.type == "cuda" else 16)
    console = Console(width=max(Console().width, 140))  # whole columns also in a file
    for title in options.networks:
        torch.manual_seed(0)
        network = getattr(models, NETWORKS[title])().to(device)
        batch = torch.rand(size, 3, 32, 32, device=device), torch.randint(10, (size,), device=device)
        console.print(optimizer_part(network, device, 5 * options.rounds, title))
        console.print(step_time(network, batch, device, options.bf16, options.rounds, options.steps, title))
        console.print(memory(network, batch, device, options.bf16, title))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    console.print(
        f"{hardware}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds in turn"
    )


if __name__ == "__main__":
    main()
