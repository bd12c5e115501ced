"""SCRUB: drive the student away from the teacher on the forget set, and back to it on the remaining data.

Source: Kurmanji, Triantafillou, Hayes, Triantafillou, NeurIPS 2023, https://arxiv.org/abs/2302.09880; official code
https://github.com/meghdadk/SCRUB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from torchlethe.arguments import check_above, check_at_least, check_choice
from torchlethe.components import all_reduce_sum, batch_norm_in_eval, eval_mode
from torchlethe.components.teacher_logits import TeacherLogits
from torchlethe.data import PADDING_LABEL, Feed, PositionedLoader, RoleLoader, model_input
from torchlethe.functional.distillation import distillation_kl
from torchlethe.updates.base import (
    Backward,
    BatchNormMode,
    OptimizerFactory,
    UpdateRule,
    logits_and_labels,
    plain_backward,
)
from torchlethe.updates.originals import KeepsOriginal


def scrub_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the official settings for large networks."""
    return SGD(parameters, lr=5e-4, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class ForgetThenRemain(Feed):
    """A whole run: in the first epochs a pass over the forget set, and in every epoch one over the remaining data.

    Args:
        epochs: passes over the remaining data.
        forget_epochs: epochs, from the first, that begin with a pass over the forget set.
        held_out: also name the validation role, for measurements.
        forget_batch_size: samples of a forget batch and rank; None takes the size of the remaining batches.
    """

    epochs: int
    forget_epochs: int
    held_out: bool = False
    forget_batch_size: int | None = None

    @property
    def roles(self) -> frozenset[str]:
        """Forget and remain, and validation when asked for."""
        return frozenset({"forget", "remain"} | ({"validation"} if self.held_out else set()))

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return self.forget_epochs * batches["forget"] + self.epochs * batches["remain"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        for number in range(self.epochs):
            if number < self.forget_epochs:
                first = (epoch * self.forget_epochs + number) * batches["forget"]
                yield from ({"forget": first + k} for k in range(batches["forget"]))
            first = (epoch * self.epochs + number) * batches["remain"]
            yield from ({"remain": first + k} for k in range(batches["remain"]))

    @override
    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        if self.forget_batch_size is None:
            return None
        sizes = dict.fromkeys(self.roles, batch_size) | {"forget": self.forget_batch_size}
        return RoleLoader({role: role_set(role) for role in sorted(self.roles)}, self, sizes, seed, **kwargs)


class SCRUBUpdate(KeepsOriginal, UpdateRule):
    r"""Max steps on the forget set, min steps on the remaining data, with one optimizer.

    Each of ``epochs`` begins, up to epoch ``msteps``, with a pass over the forget set that minimises
    :math:`-\mathrm{KL}_T`, and goes on with a pass over the remaining data that minimises
    :math:`\gamma\,\mathrm{CE} + \alpha\,\mathrm{KL}_T`; both divergences are from the original network.

    Args:
        epochs: number E of epochs.
        msteps: number of epochs with a pass over the forget set, at most E.
        gamma: weight of the cross-entropy on the remaining data, at least 0.
        alpha: weight of the divergence there, at least 0.
        temperature: T, above 0.
        optimizer: makes the optimizer from the parameters.
        lr_schedule: the learning rate over epochs: ``constant``, ``cosine``, or ``milestones``.
        milestones: epochs, counted from 1, after which the rate is multiplied by ``lr_factor``.
        lr_factor: see ``milestones``.
        rewind: SCRUB+R: return the weights of that epoch whose error on the forget set is closest to the final weights'
            error on the validation data of the classes in the forget set. Reads the role validation too, and keeps a
            copy of the weights for each epoch on the CPU.
        bn_mode: whose statistics BatchNorm normalises with (and gathers): ``train``, those of every batch; ``eval``, of
            none; ``remain``, of remaining batches only.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        epochs: int = 3,
        msteps: int = 2,
        gamma: float = 0.99,
        alpha: float = 0.001,
        temperature: float = 4.0,
        optimizer: OptimizerFactory = scrub_optimizer,
        lr_schedule: Literal["constant", "cosine", "milestones"] = "constant",
        milestones: Sequence[int] = (),
        lr_factor: float = 0.1,
        rewind: bool = False,
        bn_mode: BatchNormMode = "train",
        forget_batch_size: int | None = None,
        cache_teacher: bool = False,
    ) -> None:
        if forget_batch_size is not None:
            check_at_least(1, forget_batch_size=forget_batch_size)
        check_at_least(1, epochs=epochs)
        if not 0 <= msteps <= epochs:
            raise ValueError(f"msteps is {msteps}, it must lie in 0…{epochs}, the number of epochs.")
        check_at_least(0, gamma=gamma, alpha=alpha)
        check_above(0, temperature=temperature, lr_factor=lr_factor)
        check_choice(("constant", "cosine", "milestones"), lr_schedule=lr_schedule)
        if milestones and lr_schedule != "milestones":
            raise ValueError(f"milestones is {list(milestones)}, but lr_schedule is '{lr_schedule}'.")
        check_choice(("train", "eval", "remain"), bn_mode=bn_mode)
        self.epochs, self.msteps, self.gamma, self.alpha = epochs, msteps, gamma, alpha
        self.temperature, self.optimizer, self.bn_mode = temperature, optimizer, bn_mode
        self.lr_schedule, self.milestones, self.lr_factor = lr_schedule, tuple(milestones), lr_factor
        self.rewind = rewind
        self.feed = ForgetThenRemain(epochs, msteps, rewind, forget_batch_size)
        self.cache_teacher = cache_teacher
        self.cached: dict[str, TeacherLogits] = {}
        self.passes: dict[str, int] = {}
        self.steps = 0
        self.loaders: Mapping[str, Iterable[Any]] = {}
        self.history: list[dict[str, Any]] = []
        self.chosen_epoch: int | None = None

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters, and the teacher."""
        self.prepared, self.history, self.chosen_epoch, self.cached = False, [], None, {}
        self.place_original(network)
        self.optimizers = [self.optimizer([p for p in network.parameters() if p.requires_grad])]
        return self.optimizers

    def set_passes(self, batches: Mapping[str, int]) -> None:
        """The batches of a pass over each role give the number of steps."""
        self.passes = dict(batches)
        self.steps = self.feed.length(batches)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Keep the loaders, which SCRUB+R measures on at the end of each epoch; ask the teacher, if it is cached."""
        self.loaders = loaders
        roles = ("forget", "remain") if self.cache_teacher else ()
        self.cached = {role: TeacherLogits(self.original, loaders[role]) for role in roles}
        return super().prepare(network, loaders)

    def place(self, k: int) -> tuple[int, str, bool]:
        """The epoch (from 0) and the role of step k, and whether it is the last step of its epoch."""
        if not self.passes:
            raise RuntimeError("SCRUBUpdate.step needs set_passes({'forget': …, 'remain': …}) first.")
        forget, remain = self.passes["forget"], self.passes["remain"]
        with_forget = self.msteps * (forget + remain)
        if k < with_forget:
            epoch, within = divmod(k, forget + remain)
            return epoch, "forget" if within < forget else "remain", within == forget + remain - 1
        epoch, within = divmod(k - with_forget, remain)
        return self.msteps + epoch, "remain", within == remain - 1

    def learning_rate_factor(self, epoch: int) -> float:
        """What the learning rate is multiplied by in an epoch, from 0."""
        if self.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.lr_factor ** sum(epoch >= milestone for milestone in self.milestones)

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """One max step or one min step, and at the end of an epoch the measurement of SCRUB+R."""
        epoch, role, last = self.place(k)
        (optimizer,) = self.optimizers
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.learning_rate_factor(epoch)
        batch = model_input(batch.get(role, batch) if isinstance(batch, dict) else batch)
        held = self.bn_mode == "eval" or (self.bn_mode == "remain" and role == "forget")
        optimizer.zero_grad(set_to_none=True)
        with batch_norm_in_eval(network) if held else nullcontext():
            logits, labels = logits_and_labels(network, batch)
        teacher = self._teacher(role, batch)
        divergence = distillation_kl(logits, teacher, self.temperature)
        logs: dict[str, Tensor | float] = {"lr": optimizer.param_groups[0]["lr"]}
        if role == "forget":
            backward(-divergence)
            logs["forget_divergence"] = divergence.detach()
        else:
            loss = nn.functional.cross_entropy(logits, labels)
            backward(self.gamma * loss + self.alpha * divergence)
            logs |= {"remain_loss": loss.detach(), "remain_divergence": divergence.detach()}
        optimizer.step()
        if self.rewind and last:
            logs |= self._remember(network, epoch)
        return logs

    def _teacher(self, role: str, batch: dict[str, Any]) -> Tensor:
        """The original's logits, in at least float32."""
        if self.cache_teacher and role not in self.cached:
            raise RuntimeError("SCRUBUpdate with cache_teacher needs prepare(network, loaders) before its steps.")
        with torch.no_grad():
            if role in self.cached:
                found = self.cached[role](batch)
                return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
            return logits_and_labels(self.original, batch)[0]

    def _remember(self, network: nn.Module, epoch: int) -> dict[str, Tensor | float]:
        if not self.loaders:
            raise RuntimeError("SCRUBUpdate with rewind needs prepare(network, loaders) before its steps.")
        error, seen = _error(network, self.loaders["forget"])
        state = {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}
        self.history.append({"error": error, "state": state})
        if epoch + 1 < self.epochs:
            return {"forget_error": error}
        held_out, _ = _error(network, self.loaders["validation"], seen)
        gaps = [abs(past["error"] - held_out) for past in self.history]
        self.chosen_epoch = gaps.index(min(gaps))
        network.load_state_dict(self.history[self.chosen_epoch]["state"])
        self.history = []
        return {"forget_error": error, "held_out_error": held_out, "rewound_to_epoch": float(self.chosen_epoch + 1)}

    def state_dict(self) -> dict[str, Any]:
        """The teacher's hash and with SCRUB+R the weights of the epochs so far; a resumed run prepares again."""
        return {"prepared": False, "history": self.history, "chosen": self.chosen_epoch} | self.original_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.check_original(state)
        super().load_state_dict(state)
        self.history, self.chosen_epoch = list(state["history"]), state["chosen"]


@torch.no_grad()
def _error(network: nn.Module, loader: Iterable[Any], classes: Tensor | None = None) -> tuple[float, Tensor]:
    """Share of wrong predictions (in percent, over all ranks) among the given classes, and the classes seen."""
    counts: Tensor | None = None
    with eval_mode(network):
        for raw in loader:
            logits, labels = logits_and_labels(network, raw)
            if counts is None:
                counts = torch.zeros(2, logits.shape[1] + 1, dtype=torch.long, device=logits.device)
            kept = torch.where(labels == PADDING_LABEL, logits.shape[1], labels)
            counts[0].index_add_(0, kept, torch.ones_like(kept))
            counts[1].index_add_(0, kept, (logits.argmax(1) != labels).long())
    if counts is None:
        raise ValueError("the error needs at least one batch, the loader gave none.")
    counts = all_reduce_sum(counts)[:, :-1]
    seen = counts[0] > 0
    total, wrong = (counts if classes is None else counts * classes).sum(1).tolist()
    if not total:
        raise ValueError("the validation data has no sample of the forget set's classes, which SCRUB+R compares with.")
    return 100 * wrong / total, seen
