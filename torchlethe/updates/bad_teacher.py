"""Bad teaching: on the forget set learn from a network that knows nothing, on the rest from the original.

Source: Chundawat, Tarun, Mandal, Kankanhalli, AAAI 2023, https://arxiv.org/abs/2205.08096; official code
https://github.com/vikram2000b/bad-teaching-unlearning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from torchlethe.arguments import check_above, check_choice, check_within
from torchlethe.components.originals import matched, randomised_copy
from torchlethe.components.teacher_logits import TeacherLogits
from torchlethe.data import Joined, PositionedLoader, model_input
from torchlethe.data.hashing import generator_for
from torchlethe.data.roles import JoinedDataset
from torchlethe.functional.distillation import bad_teacher_loss
from torchlethe.updates.base import LossUpdate, OptimizerFactory, logits_and_labels
from torchlethe.updates.originals import KeepsOriginal


def bad_teacher_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam with the official learning rate."""
    return Adam(parameters, lr=1e-4)


@dataclass(frozen=True)
class JoinedShare(Joined):
    """The forget set shuffled together with a fixed random share of the remaining data.

    Args:
        share: of the remaining data, in (0, 1].
        share_seed: which share.
    """

    share: float = 1.0
    share_seed: int = 0

    @override
    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        if self.share == 1:
            return None
        remain = role_set("remain")
        order = torch.randperm(len(remain), generator=generator_for("remaining share", self.share_seed))
        some = remain.subset(order[: max(1, int(self.share * len(remain)))].sort().values)
        union = JoinedDataset(role_set("forget"), some)
        return PositionedLoader(union, batch_size=batch_size, shuffle=True, seed=seed, **kwargs)


class BadTeacherUpdate(KeepsOriginal, LossUpdate):
    """Distil both teachers into the network, batch by batch.

    A batch holds samples of both sets with ``is_forget`` (B,), as the feed serves; a dict with a batch for each role
    works too.

    Args:
        optimizer: makes the optimizer from the parameters.
        temperature: T, above 0.
        remain_share: share of the remaining data that is used, in (0, 1].
        seed: of the incompetent teacher's weights and of the share.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.
        mean: what the divergence is a mean over: ``elements``, samples and classes, as in the official code; or
            ``samples``, K times larger, as in NatMU's version of the method.
        cache_teacher: ask both teachers once for each sample, see
            :class:`~torchlethe.components.teacher_logits.TeacherLogits`; for training without augmentation over more
            than one epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = bad_teacher_optimizer,
        temperature: float = 1.0,
        remain_share: float = 0.3,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
        mean: Literal["elements", "samples"] = "elements",
        cache_teacher: bool = False,
    ) -> None:
        check_choice(("elements", "samples"), mean=mean)
        if bn_mode not in ("train", "eval"):
            raise ValueError(
                f"bn_mode is '{bn_mode}', allowed are train and eval, as batches hold samples of both sets."
            )
        super().__init__(optimizer, bn_mode)
        check_above(0, temperature=temperature)
        check_within(0, 1, "(]", remain_share=remain_share)
        self.temperature, self.seed, self.mean = temperature, seed, mean
        self.feed = JoinedShare(remain_share, seed)
        self.incompetent: nn.Module | None = None
        self.cache_teacher = cache_teacher
        self.cached: tuple[TeacherLogits, TeacherLogits] | None = None

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters, and both teachers."""
        self.prepared, self.cached = False, None
        self.place_original(network)
        self.incompetent = matched(randomised_copy(self.original, self.seed), network)
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Ask both teachers, if they are cached."""
        if self.cache_teacher:
            assert self.incompetent is not None  # configure came before
            pairs = ((self.original, "remain"), (self.incompetent, "forget"))
            remain, forget = (TeacherLogits(teacher, loaders[role]) for teacher, role in pairs)
            self.cached = (remain, forget)
        return super().prepare(network, loaders)

    def _targets(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of the original and of the incompetent network; from a cache each is right for its own samples."""
        assert self.incompetent is not None  # configure came before
        if not self.cache_teacher:
            teachers = (self.original, self.incompetent)
            competent, incompetent = (logits_and_labels(teacher, batch)[0] for teacher in teachers)
            return competent, incompetent
        if self.cached is None:
            raise RuntimeError("BadTeacherUpdate with cache_teacher needs prepare(network, loaders) before its steps.")
        if not all(cached.checked for cached in self.cached):
            for cached, own in zip(self.cached, (~batch["is_forget"], batch["is_forget"]), strict=True):
                cached({"image": batch["image"][own], "index": batch["index"][own]})
        remain, forget = (cached.look_up(batch["index"]) for cached in self.cached)
        return remain, forget

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Divergence from the teacher that is meant for each sample."""
        batch = _joined(batch)
        with self.batch_norm(network):
            logits, _ = logits_and_labels(network, batch)
        with torch.no_grad():
            competent, incompetent = self._targets(batch)
        loss = bad_teacher_loss(logits, competent, incompetent, batch["is_forget"], self.temperature, self.mean)
        share = batch["is_forget"].float().mean()
        return loss, {"distillation_loss": loss.detach(), "forget_share": share}

    def state_dict(self) -> dict[str, Any]:
        """The original's hash; both teachers are made anew, and asked again where they are cached."""
        return super().state_dict() | self.original_state() | ({"prepared": False} if self.cache_teacher else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.check_original(state)
        super().load_state_dict(state)


def _joined(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, dict) or "is_forget" not in batch:
        if not isinstance(batch, dict) or set(batch) != {"forget", "remain"}:
            raise ValueError("BadTeacherUpdate needs batches with 'is_forget' (B,), or a dict with forget and remain.")
        parts = {role: model_input(part) for role, part in batch.items()}
        flags = [torch.full_like(parts[role]["label"], role == "forget") for role in ("forget", "remain")]
        batch = {
            key: torch.cat([parts["forget"][key], parts["remain"][key]])
            for key in ("image", "label", "index")
            if all(key in part for part in parts.values())
        }
        batch["is_forget"] = torch.cat(flags).bool()
    return model_input(batch)
