"""A module as other projects write them, the methods once more as formulas on one vector, and the runs of two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassPrecision

from tests.helpers import quiet_trainer
from torchlethe.callbacks import AscentDirection, SharpnessAware
from torchlethe.components import SharpnessEngine
from torchlethe.optimizers import FriendlySAM, sam_step

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def data(count: int = 48, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, 6)`` and labels of four classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 4, (count,), generator=generator)


def loader(batch_size: int = 8, count: int = 48, dtype: torch.dtype = torch.float64) -> DataLoader:
    """The data in order."""
    return DataLoader(TensorDataset(*data(count, dtype)), batch_size)


def mlp(batch_norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small network from a fixed initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        middle: list[nn.Module] = [nn.BatchNorm1d(10)] if batch_norm else []
        middle += [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(nn.Linear(6, 10), *middle, nn.Tanh(), nn.Linear(10, 4)).to(dtype)


class Foreign(LightningModule):
    """Somebody else's module: it knows nothing of two passes.

    Args:
        net: the network.
        optimizer: makes the optimizer of the parameters.
    """

    def __init__(self, net: nn.Module | None = None, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, **SGD))
        # the first two share a state
        members = [kind(4, average="macro") for kind in (MulticlassAccuracy, MulticlassPrecision)]
        self.scores = MetricCollection([*members, MulticlassConfusionMatrix(4)])
        self.seen: list[tuple[int, float]] = []
        self.hooks: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy, scores on the side."""
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        logits = self(x)
        self.scores.update(logits.detach(), y)
        return nn.functional.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss.detach()}, on_epoch=True)
        self.seen.append((getattr(self, "sam_pass", 0), float(loss.detach())))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the scores of the epoch."""
        self.log_dict({f"score/{name}": value for name, value in self.scores.compute().items() if value.ndim == 0})
        self.counts = self.scores["MulticlassConfusionMatrix"].confmat.sum().item()
        self.updates = [metric._update_count for metric in self.scores.values()]
        self.scores.reset()

    def configure_optimizers(self) -> Any:
        """The optimizer that was asked for."""
        return self.optimizer(self.parameters())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Count."""
        self.hooks.append("before_step")

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Count, and clip."""
        self.hooks.append("clip")
        super().configure_gradient_clipping(*args, **kwargs)

    def on_after_backward(self) -> None:
        """Count."""
        self.hooks.append("after_backward")


def fit(
    module: LightningModule, callback: Callback | Sequence[Callback] | None, batches: Any = None, **trainer: Any
) -> Any:
    """Train for an epoch unless told otherwise, and return the trainer."""
    callbacks = [callback] if isinstance(callback, Callback) else list(callback or [])
    trainer = {"max_epochs": 1, "log_every_n_steps": 1, "callbacks": callbacks} | trainer
    run = quiet_trainer(**trainer)
    run.fit(module, loader() if batches is None else batches)
    return run


# --- the methods once more, as formulas on one vector ---------------------------------------------------------------


class Formulas:
    """What the methods do to a network, from the papers' formulas; every micro-batch and every rank by hand.

    Args:
        net: the network, trained in place.
        method: name.
        rho: radius.
        accumulate: what the loss of a micro-batch is divided by.
        interval: two passes every so many steps.
        warmup: steps with one pass at the beginning.
        moved: whether the climb moves a parameter, by name.
        clip: norm to clip the update to.
        options: the method's.
    """

    def __init__(
        self,
        net: nn.Module,
        method: str,
        rho: float,
        accumulate: int = 1,
        interval: int = 1,
        warmup: int = 0,
        moved: Callable[[str], bool] = lambda name: True,
        clip: float | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, **SGD),
        **options: Any,
    ) -> None:
        self.net, self.method, self.rho, self.accumulate = net, method, rho, accumulate
        self.interval, self.warmup, self.clip, self.options = interval, warmup, clip, options
        self.params = list(net.parameters())
        self.mask = torch.cat([torch.full((p.numel(),), float(moved(n))) for n, p in net.named_parameters()]).double()
        self.optimizer = optimizer(self.params)
        self.memory: dict[int, Tensor] = {}
        self.losses: list[tuple[float, float | None]] = []

    @property
    def weights(self) -> Tensor:
        """All weights as one vector."""
        return nn.utils.parameters_to_vector(self.params).detach().clone()

    def _gradient(self, batch: Any, at: Tensor | None = None) -> tuple[Tensor, float]:
        kept = self.weights
        if at is not None:
            nn.utils.vector_to_parameters(at, self.params)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.params)])
        nn.utils.vector_to_parameters(kept, self.params)
        return gradient, loss.item()

    def _micro(self, batch: Any, two: bool, rank: int) -> tuple[Tensor, Tensor | float]:
        """The update of a micro-batch, and what acts past the optimizer."""
        o, g, loss = self.options, *self._gradient(batch)
        masked, m = g * self.mask, self.memory.get(rank)
        d, epsilon = masked, 1e-7 if self.method == "vasso" else 1e-12
        if self.method == "fsam":
            lmbda = o.get("lmbda", 0.9)
            d = masked if m is None else masked - o.get("sigma", 1.0) * m
            self.memory[rank] = masked if m is None else lmbda * m + (1 - lmbda) * masked
        if self.method == "vasso":
            d = self.memory[rank] = masked if m is None else 0.1 * m + 0.9 * masked
        if not two:
            self.losses.append((loss, None))
            if self.method == "looksam" and m is not None:
                return g + o.get("alpha", 0.7) * g.norm() / (m.norm() + 1e-8) * m, 0.0
            return g, 0.0
        s, perturbed = self._gradient(batch, self.weights + self.rho * d / (d.norm() + epsilon))
        self.losses.append((loss, perturbed))
        if self.method == "gsam":
            cosine = g @ s / (g.norm() * s.norm() + 1e-12)
            return s - o.get("alpha", 0.4) * (g - cosine * g.norm() * s / (s.norm() + 1e-12)), 0.0
        if self.method == "wsam":
            weight = o.get("gamma", 0.9) / (1 - o.get("gamma", 0.9))
            return (g, weight * (s - g)) if o.get("decoupled", True) else (g + weight * (s - g), 0.0)
        if self.method == "looksam":
            self.memory[rank] = s - (g @ s / g.norm() ** 2) * g
        return s, 0.0

    def step(self, number: int, micro_batches: Sequence[Sequence[Any]]) -> None:
        """One optimizer step.

        Args:
            number: of the step.
            micro_batches: for each micro-batch the batches of the ranks that climb by themselves (one if ranks are
                joined).
        """
        two = number >= self.warmup and (number - self.warmup) % self.interval == 0
        update, past = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        for batches in micro_batches:
            for rank, batch in enumerate(batches):
                u, c = self._micro(batch, two, rank)
                update += u / self.accumulate / len(batches)
                past += c / self.accumulate / len(batches)
        if self.clip is not None:
            update *= min(1.0, self.clip / (update.norm().item() + 1e-6))
        place = 0
        for param in self.params:
            param.grad = update[place : place + param.numel()].view_as(param).clone()
            place += param.numel()
        self.optimizer.step()
        nn.utils.vector_to_parameters(self.weights - self.optimizer.param_groups[0]["lr"] * past, self.params)


def in_groups(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive groups; the last may be smaller."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def by_formulas(
    net: nn.Module, method: str, epochs: int = 1, batch_size: int = 8, ranks: int = 1, count: int = 48, **options: Any
) -> Formulas:
    """Train with :class:`Formulas` on the data in order; several ranks take every so-manieth sample and climb alone."""
    x, y = data(count)
    formulas, number = Formulas(net, method, **options), 0
    parts = [(x[rank::ranks].split(batch_size), y[rank::ranks].split(batch_size)) for rank in range(ranks)]
    batches = [[(inputs[i], labels[i]) for inputs, labels in parts] for i in range(len(parts[0][0]))]
    for _ in range(epochs):
        for group in in_groups(batches, formulas.accumulate):
            formulas.step(number, group)
            number += 1
    return formulas


# --- two ranks --------------------------------------------------------------------------------------------------------


def layer_norm_mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A network with parameters for ``norm_only`` and no statistics over the batch."""
    net = mlp(dtype=dtype)
    return nn.Sequential(net[0], nn.LayerNorm(10, dtype=dtype), *net[1:])


class Halves(Foreign):
    """fp16 overflows on rank 1, in the first pass of step 3."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch."""
        loss = super().training_step(batch, batch_idx)
        bad = batch_idx == 3 and self.global_rank == 1 and self.sam_pass == self.bad_pass
        return loss * 1e36 if bad else loss


class OneSided(Foreign):
    """A branch that only rank 0 uses."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.branch = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x) + self.branch(x) if self.global_rank == 0 else self.net(x)


class ByHand(Foreign):
    """F-SAM under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.engine = SharpnessEngine("fsam", 0.2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the optimizer."""

        def closure() -> Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        sam_step(self.optimizers(), closure, self.engine)


def without_callback(how: str, ranks: int) -> Tensor:
    """The weights after F-SAM as an optimizer, or by hand."""
    wrapped = {"optimizer": lambda: Foreign(optimizer=lambda p: FriendlySAM(p, rho=0.2, **SGD)), "hand": ByHand}
    module: Foreign = wrapped[how]()  # type: ignore[operator]
    assert fit(module, None, rank_loader(ranks), **parallel(ranks, {})).global_step == 7
    return vector(module.net)


METHODS: dict[str, dict[str, Any]] = {
    "fsam": {"lmbda": 0.6},
    "vasso": {},
    "gsam": {},
    "wsam": {},
    "looksam": {"interval": 2},
}
TWICE = {"accumulate_grad_batches": 2}
VIEW = {"gradient_as_bucket_view": True}


def _runs() -> dict[str, dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for scope in ("global", "local"):
        for method, options in METHODS.items():
            base = {"callback": {"method": method, "scope": scope, **options}}
            runs[f"{scope} {method}"] = base
            views = VIEW if method != "wsam" else {}
            runs[f"{scope} {method} twice"] = base | {"trainer": TWICE, "ddp": views}
        runs[f"{scope} wsam views"] = runs[f"{scope} wsam"] | {"ddp": VIEW}
        plain = {"callback": {"method": "fsam", "scope": scope}}
        runs[f"{scope} fsam twice, no views"] = plain | {"trainer": TWICE}
        fsam = {"method": "fsam", "scope": scope}
        part = fsam | {"perturb": r"^net\.[02]\.weight"}
        runs[f"{scope} part"] = {"callback": part}
        runs[f"{scope} part twice"] = {"callback": part, "trainer": TWICE, "ddp": VIEW}
        runs[f"{scope} norms"] = {"callback": fsam | {"perturb": "norm_only"}, "net": layer_norm_mlp, "trainer": TWICE}
        runs[f"{scope} every third"] = {"callback": fsam | {"interval": 3, "warmup_steps": 1}, "trainer": TWICE}
        esam = {"method": "esam", "scope": scope, "gamma": 0.5, "beta": 0.5}
        runs[f"{scope} esam"] = {"callback": esam, "trainer": TWICE}
    runs["global tensors of esam"] = {"callback": {"method": "esam", "gamma": 1.0, "beta": 0.5}, "trainer": TWICE}
    unused = {"find_unused_parameters": True}
    runs["global unused"] = {"callback": {"method": "fsam"}, "ddp": unused, "unused": True}
    for direction in ("full", "noise"):
        runs[f"global {direction}"] = {"kind": AscentDirection, "callback": {"direction": direction, "refresh": 3}}
    runs["global one-sided"] = {"callback": {"method": "fsam"}, "ddp": unused, "trainer": TWICE, "module": OneSided}
    runs["global static"] = {"callback": {"method": "fsam"}, "ddp": {"static_graph": True}}
    return runs


RANK_RUNS = _runs()


def rank_run(name: str, ranks: int) -> tuple[Foreign, SharpnessAware, Any]:
    """A run of RANK_RUNS on one rank or two, on the same samples in every step."""
    run = RANK_RUNS[name]
    module = run.get("module", Foreign)(run.get("net", mlp)())
    if run.get("unused"):
        module.unused = nn.Linear(2, 2, dtype=torch.float64)
    callback = run.get("kind", SharpnessAware)(rho=0.2, **run["callback"])
    trainer = fit(module, callback, rank_loader(ranks), **run.get("trainer", {}), **parallel(ranks, run.get("ddp", {})))
    return module, callback, trainer


def rank_loader(ranks: int, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches of 16 over all ranks, the last incomplete group of two among them."""
    rows = TensorDataset(*data(112, dtype))
    if ranks == 1:
        return DataLoader(rows, 16)
    return DataLoader(rows, 8, sampler=DistributedSampler(rows, ranks, torch.distributed.get_rank(), shuffle=False))


def parallel(ranks: int, ddp: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments for some ranks."""
    if ranks == 1:
        return {}
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment(), **ddp)
    return {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False}


def vector(net: nn.Module) -> Tensor:
    """All weights as one vector."""
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def rank_main(rank: int, folder: str) -> None:
    """Everything that one of two ranks does; writes what it found."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in RANK_RUNS:
        module, callback, trainer = rank_run(name, 2)
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        state = callback.state_dict()["memory"]
        found[name] = {"weights": vector(module.net), "state": state, "passes": [number for number, _ in module.seen]}
    for number in (1, 2):
        for method in ("fsam", "wsam", "looksam"):
            found[f"overflow {number} {method}"] = overflow_run(method, number)
    found["without"] = {how: without_callback(how, 2) for how in ("optimizer", "hand")}
    found["resume"] = resume_run(Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def overflow_run(method: str, bad_pass: int) -> dict[str, Any]:
    """Local fp16, where only rank 1 overflows."""
    module = Halves(mlp(dtype=torch.float32))
    module.bad_pass = bad_pass
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    options = {"interval": 1} if method == "looksam" else {}
    callback = SharpnessAware(method, rho=0.2, scope="local", **options)  # type: ignore[arg-type]
    fit(module, callback, rank_loader(2, torch.float32), plugins=[plugin], **parallel(2, {}))
    passes = [number for number, _ in module.seen]
    return {"weights": vector(module.net), "scale": scaler.get_scale(), "passes": passes}


def resume_run(folder: Path) -> dict[str, Any]:
    """Local F-SAM over two epochs, straight and resumed after the first."""
    weights = []
    for start in (None, folder / "resume" / "epoch=0.ckpt"):
        module, callback = Foreign(), SharpnessAware(rho=0.2, scope="local")
        checkpoints = ModelCheckpoint(folder / "resume", "{epoch}", save_top_k=-1)
        settings: dict[str, Any] = {"max_epochs": 2, "callbacks": [callback, checkpoints], "enable_checkpointing": True}
        run = quiet_trainer(**settings, **parallel(2, {}))
        run.fit(module, rank_loader(2), ckpt_path=start)
        weights.append(vector(module.net))
    return {"straight": weights[0], "resumed": weights[1]}
