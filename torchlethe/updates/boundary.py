"""Boundary unlearning: give forget samples to the nearest other class (shrink), or to a class that is then dropped.

Source: Chen, Gao, Liu, Peng, Wang, CVPR 2023, https://arxiv.org/abs/2303.11570; code
https://github.com/TY-LEE-KR/Boundary-Unlearning-Code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_above
from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many, world_size
from torchlethe.data import Single, model_input
from torchlethe.data.hashing import generator_for
from torchlethe.functional.distillation import boundary_images
from torchlethe.models import head_of
from torchlethe.updates.base import LossUpdate, OptimizerFactory, logits_and_labels
from torchlethe.updates.originals import KeepsOriginal


def boundary_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the official settings."""
    return SGD(parameters, lr=1e-5, momentum=0.9)


class BoundaryShrinkUpdate(KeepsOriginal, LossUpdate):
    """Train forget samples towards the class across the original network's nearest boundary; reads these only.

    The label of a sample is the original network's prediction on the image after one signed-gradient step (FGSM) away
    from the true label.

    Args:
        optimizer: makes the optimizer from the parameters.
        epsilon: size of the step in pixel units, above 0.
        skip_failed: leave samples out whose prediction the step did not change; they are else trained on their own
            label, which reinforces them.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        With ``skip_failed`` under DDP the mean runs over the samples of all ranks.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = boundary_optimizer,
        epsilon: float = 0.1,
        skip_failed: bool = False,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_above(0, epsilon=epsilon)
        self.epsilon, self.skip_failed = epsilon, skip_failed
        self.feed = Single("forget")
        self.crossed: Tensor | None = None

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters, and the original network."""
        self.prepared, self.crossed = False, None
        self.place_original(network)
        return super().configure(network)

    def neighbours(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The images after the step, ``(B, C, H, W)``, and the original network's predictions on them, ``(B,)``."""
        with torch.inference_mode(False), torch.enable_grad():
            start = image.detach().clone().requires_grad_()
            logits, _ = logits_and_labels(self.original, {"image": start, "label": label})
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, label, reduction="sum"), start)
        with torch.no_grad():
            moved = boundary_images(image.detach(), gradient, self.epsilon)
            return moved, self.original(moved).argmax(1)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy towards the neighbouring classes."""
        batch = model_input(batch)
        _, target = self.neighbours(batch["image"], batch["label"])
        with self.batch_norm(network, "forget"):
            logits, labels = logits_and_labels(network, batch)
        crossed = target != labels
        losses = nn.functional.cross_entropy(logits, target, reduction="none")
        if self.skip_failed:
            loss = world_size() * (losses * crossed).sum() / all_reduce_sum(crossed.sum()).clamp_min(1)
        else:
            loss = losses.mean()
        self.crossed = crossed.sum() if self.crossed is None else self.crossed + crossed.sum()
        return loss, {"boundary_loss": loss.detach(), "boundary_crossed": crossed.float().mean()}

    def finish(self, network: nn.Module) -> None:
        """Warn when the step never reached another class."""
        if self.crossed is not None and not int(self.crossed):
            warnings.warn(
                f"no forget sample crossed a boundary with epsilon {self.epsilon}, nothing was forgotten: raise it.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The original's hash, and how many samples crossed a boundary."""
        return super().state_dict() | {"crossed": self.crossed} | self.original_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.check_original(state)
        super().load_state_dict(state)
        device = next(self.original.parameters()).device
        self.crossed = None if state["crossed"] is None else state["crossed"].to(device)


class BoundaryExpandUpdate(LossUpdate):
    """Train forget samples into an extra class, which does not outlive the run; reads these only.

    The extra class's row of weights is kept beside the network, so the network has its number of outputs all the time
    and in every checkpoint. (Some repositories keep the row, and count predictions of the extra class as forgotten.)

    Args:
        optimizer: makes the optimizer from the parameters.
        seed: of the row's initial weights, uniform in ±1/√D as those of a linear layer.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Note:
        The network must end in a linear layer that :func:`torchlethe.models.head_of` finds. Compiled networks are
        refused, as their layers cannot be looked into.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = boundary_optimizer,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        self.seed = seed
        self.feed = Single("forget")
        self.row: list[nn.Parameter] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters and the extra row."""
        self.prepared = False
        head = head_of(network)
        bound = 1 / math.sqrt(head.in_features)
        generator = generator_for("extra class", self.seed)
        sizes = [head.in_features] + ([1] if head.bias is not None else [])
        rows = [(torch.rand(1, size, generator=generator) * 2 - 1) * bound for size in sizes]
        self.row = [nn.Parameter(row.to(head.weight)) for row in rows]
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizers = [self.optimizer([*trained, *self.row])]
        return self.optimizers

    def expanded_logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """Logits ``(B, K + 1)``, the last column that of the extra class."""
        seen: list[Tensor] = []
        handle = head_of(network).register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        try:
            logits = network(image)
        finally:
            handle.remove()
        if not seen or seen[-1].ndim != 2 or logits.ndim != 2:
            raise ValueError(
                f"BoundaryExpand needs a network that is not compiled and whose head reads (B, D) features, "
                f"{type(network).__name__} showed {tuple(seen[-1].shape) if seen else 'none'}."
            )
        weight, *bias = self.row
        extra = nn.functional.linear(seen[-1], weight, bias[0].flatten() if bias else None)
        joined = torch.cat([logits, extra.to(logits.dtype)], 1)
        return joined.float() if joined.dtype in (torch.float16, torch.bfloat16) else joined

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy towards the extra class."""
        if not self.row:
            raise RuntimeError("BoundaryExpandUpdate.loss came before configure(network).")
        batch = model_input(batch)
        with self.batch_norm(network, "forget"):
            logits = self.expanded_logits(network, batch["image"])
        target = torch.full_like(batch["label"], logits.shape[1] - 1)
        loss = nn.functional.cross_entropy(logits, target)
        return loss, {"boundary_loss": loss.detach(), "boundary_expanded": (logits.argmax(1) == target).float().mean()}

    def before_optimizer_step(self) -> None:
        """Average the row's gradient over ranks: it is no part of what DDP wraps."""
        gradients = [p.grad for p in self.row if p.grad is not None]
        if world_size() > 1:
            for gradient, total in zip(gradients, all_reduce_sum_many(gradients), strict=True):
                gradient.copy_(total / world_size())

    def state_dict(self) -> dict[str, Any]:
        """The extra row."""
        return super().state_dict() | {"row": [p.detach() for p in self.row]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        with torch.no_grad():
            for parameter, saved in zip(self.row, state["row"], strict=True):
                parameter.copy_(saved)
