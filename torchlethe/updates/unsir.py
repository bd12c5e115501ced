"""UNSIR: learn noise that the network is worst at for a class, train on it, then repair.

Source: Tarun, Chundawat, Mandal, Kankanhalli, IEEE TNNLS 2023, https://arxiv.org/abs/2111.08947; code
https://github.com/vikram2000b/Fast-Machine-Unlearning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from torchlethe.arguments import check_above, check_at_least, check_choice
from torchlethe.components import all_reduce_sum, batch_norm_in_eval, eval_mode, world_size
from torchlethe.data import PADDING_LABEL, Feed, PositionedLoader, RoleLoader, model_input
from torchlethe.data.hashing import generator_for
from torchlethe.models import Normalize
from torchlethe.updates.base import Backward, OptimizerFactory, UpdateRule, plain_backward


def impair_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam with the official learning rate of the impair epoch."""
    return Adam(parameters, lr=0.02)


def repair_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam with the official learning rate of the repair epoch."""
    return Adam(parameters, lr=0.01)


@dataclass(frozen=True)
class ImpairThenRepair(Feed):
    """Passes over at most ``per_class`` remaining samples of each class; the forget set is named, for measurements.

    Args:
        epochs: passes of the run.
        per_class: samples of a class.
        seed: which samples.
    """

    epochs: int
    per_class: int
    seed: int = 0

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return self.epochs * batches["remain"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        steps = self.length(batches)
        return ({"remain": epoch * steps + k} for k in range(steps))

    @override
    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        remain = role_set("remain")
        order = torch.randperm(len(remain), generator=generator_for("samples of a class", self.seed))
        labels = remain.labels[order]
        kept = [order[labels == number][: self.per_class] for number in labels.unique().tolist()]
        chosen = {"forget": role_set("forget"), "remain": remain.subset(torch.cat(kept).sort().values)}
        return RoleLoader(chosen, self, batch_size, seed, **kwargs)


class UNSIRUpdate(UpdateRule):
    """Impair with noise that maximises the loss of the forgotten classes, then repair.

    ``prepare`` learns a batch of noise images for each forgotten class on the original network. The first pass over
    (some of) the remaining data has them mixed in, labelled with their class, spread evenly over the pass; the second
    pass has not. Forget images are looked at for their labels only.

    Args:
        optimizer: makes the optimizer of the impair passes.
        repair: makes that of the repair passes.
        impair_epochs: passes with noise, at least 1.
        repair_epochs: passes without.
        per_class: remaining samples of each class that are used, at most.
        noise_steps: steps of Adam (learning rate ``noise_lr``) that learn the noise.
        noise_lr: see ``noise_steps``.
        penalty: weight of the noise's mean squared length in its loss.
        noise_batch: noise images of a class.
        noise_count: how many of them are used: ``batch``, all; ``as_coded``, as many as an image has channels, which
            is what the published codes do by mistake.
        repeats: how often each of them is shown in an impair pass.
        seed: of the noise, its order and the choice of remaining samples.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range, or the forget set is not made of whole classes.

    Note:
        The noise is drawn from N(0, 1) behind the network's normalisation (:class:`~torchlethe.models.Normalize`),
        where there is one, else in pixel units. Under DDP all ranks learn the same noise and each shows its share.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = impair_optimizer,
        repair: OptimizerFactory = repair_optimizer,
        impair_epochs: int = 1,
        repair_epochs: int = 1,
        per_class: int = 1000,
        noise_steps: int = 40,
        noise_lr: float = 0.1,
        penalty: float = 0.1,
        noise_batch: int = 256,
        noise_count: Literal["batch", "as_coded"] = "batch",
        repeats: int = 1,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        check_at_least(1, impair_epochs=impair_epochs, per_class=per_class, noise_batch=noise_batch, repeats=repeats)
        check_at_least(0, repair_epochs=repair_epochs, noise_steps=noise_steps, penalty=penalty)
        check_above(0, noise_lr=noise_lr)
        check_choice(("batch", "as_coded"), noise_count=noise_count)
        check_choice(("train", "eval"), bn_mode=bn_mode)
        self.optimizer, self.repair, self.bn_mode = optimizer, repair, bn_mode
        self.impair_epochs, self.repair_epochs = impair_epochs, repair_epochs
        self.noise_steps, self.noise_lr, self.penalty = noise_steps, noise_lr, penalty
        self.noise_batch, self.noise_count, self.repeats, self.seed = noise_batch, noise_count, repeats, seed
        self.feed = ImpairThenRepair(impair_epochs + repair_epochs, per_class, seed)
        self.pass_length = self.steps = 0
        self.noise: Tensor | None = None
        self.noise_labels: Tensor | None = None

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """Two optimizers over all trainable parameters, one for each phase."""
        self.prepared, self.noise, self.noise_labels = False, None, None
        parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizers = [self.optimizer(parameters), self.repair(parameters)]
        self.device = parameters[0].device
        return self.optimizers

    def set_passes(self, batches: Mapping[str, int]) -> None:
        """The batches of a pass over the remaining data give the number of steps."""
        self.pass_length = batches["remain"]
        self.steps = self.feed.length(batches)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Find the forgotten classes and learn their noise."""
        forgotten, shape = _classes(loaders["forget"])
        remaining, _ = _classes(loaders["remain"])
        forgotten, remaining = _alike(forgotten, remaining)
        if (shared := (forgotten * remaining).nonzero().flatten()).numel():
            raise ValueError(
                f"UNSIR forgets whole classes, but class {int(shared[0])} has samples in the forget set and in the "
                "remaining data: ask for ForgetClasses."
            )
        classes = forgotten.nonzero().flatten().tolist()
        count = shape[0] if self.noise_count == "as_coded" else self.noise_batch
        learned = [self._learn_noise(network, number, shape) for number in classes]
        self.noise = torch.cat([images[:count] for images, _ in learned])
        labels = torch.tensor(classes, device=self.noise.device)
        self.noise_labels = labels.repeat_interleave(min(count, self.noise_batch))
        losses = {f"noise_loss/{number}": value for number, (_, value) in zip(classes, learned, strict=True)}
        return super().prepare(network, loaders) | losses

    def _learn_noise(self, network: nn.Module, number: int, shape: torch.Size) -> tuple[Tensor, float]:
        """Noise images for a class, in the network's input units, and the network's mean loss on them."""
        example = next(network.parameters())
        drawn = torch.randn(self.noise_batch, *shape, generator=generator_for("noise", self.seed, number))
        with torch.inference_mode(False), torch.enable_grad(), eval_mode(network):
            z = drawn.to(example).requires_grad_()
            label = torch.full((len(z),), number, device=z.device)
            adam = Adam([z], lr=self.noise_lr)
            for _ in range(self.noise_steps):
                loss = nn.functional.cross_entropy(network(_as_image(network, z)).float(), label)
                (z.grad,) = torch.autograd.grad(self.penalty * z.square().flatten(1).sum(1).mean() - loss, z)
                adam.step()
            with torch.no_grad():
                images = _as_image(network, z.detach())
                loss = nn.functional.cross_entropy(network(images).float(), label)
        return images, float(loss)

    def noise_of_step(self, within: int) -> tuple[Tensor, Tensor, int]:
        """This rank's noise images of a step of an impair pass with their labels, and how many all ranks show."""
        if self.noise is None or self.noise_labels is None:
            raise RuntimeError("UNSIRUpdate.step came before prepare(network, loaders).")
        shown = self.repeats * len(self.noise)
        start, end = (shown * k // self.pass_length for k in (within, within + 1))
        order = torch.randperm(shown, generator=generator_for("noise order", self.seed)) % len(self.noise)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        mine = order[start:end][rank :: world_size()].to(self.noise.device)
        return self.noise[mine], self.noise_labels[mine], end - start

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """One step on a remaining batch, in the impair passes with noise."""
        if not self.pass_length:
            raise RuntimeError("UNSIRUpdate.step needs set_passes({'remain': …}) first.")
        number, within = divmod(k, self.pass_length)
        impair = number < self.impair_epochs
        batch = model_input(batch.get("remain", batch) if isinstance(batch, dict) else batch)
        image, label, total = batch["image"], batch["label"], world_size() * len(batch["label"])
        if impair:
            noise, noise_label, shown = self.noise_of_step(within)
            image, label = torch.cat([image, noise.to(image)]), torch.cat([label, noise_label])
            total += shown
        optimizer = self.optimizers[0 if impair else 1]
        optimizer.zero_grad(set_to_none=True)
        with batch_norm_in_eval(network) if self.bn_mode == "eval" else nullcontext():
            logits = network(image)
        losses = nn.functional.cross_entropy(
            logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, label, reduction="none"
        )
        # ranks may show different numbers of noise images: the mean is over all of them
        backward(losses.sum() * world_size() / total)
        optimizer.step()
        logs: dict[str, Tensor | float] = {"remain_loss": losses[: len(batch["label"])].detach().mean()}
        if len(losses) > len(batch["label"]):
            logs["noise_loss"] = losses[len(batch["label"]) :].detach().mean()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """The learned noise."""
        return super().state_dict() | {"noise": self.noise, "noise_labels": self.noise_labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.noise, self.noise_labels = (
            None if state[name] is None else state[name].to(self.device) for name in ("noise", "noise_labels")
        )


def _as_image(network: nn.Module, z: Tensor) -> Tensor:
    """Noise in the units behind the network's first normalisation as an input of the network."""
    for module in network.modules():
        if isinstance(module, Normalize):
            return z * module.std.to(z) + module.mean.to(z)
    return z


def _classes(loader: Iterable[Any]) -> tuple[Tensor, torch.Size]:
    """How many samples each class has over all ranks, and the shape of an image."""
    counts, shape, device = torch.zeros(0, dtype=torch.long), torch.Size(), torch.device("cpu")
    for raw in loader:
        batch = model_input(raw)
        labels, shape = batch["label"], batch["image"].shape[1:]
        device = labels.device
        found = torch.bincount(labels[labels != PADDING_LABEL]).cpu()
        counts, found = _alike(counts, found)
        counts = counts + found
    if not shape:
        raise ValueError("UNSIR needs forget and remaining data, a loader gave none.")
    size = torch.tensor(len(counts), device=device)
    if world_size() > 1:
        torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    counts = nn.functional.pad(counts, (0, int(size) - len(counts)))
    return all_reduce_sum(counts.to(device)), shape


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Counts by class, both with as many classes as the longer one."""
    size = max(len(first), len(second))
    return nn.functional.pad(first, (0, size - len(first))), nn.functional.pad(second, (0, size - len(second)))
