"""What methods that train the forget set on random labels share: the relabelled cross-entropy."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlethe.arguments import check_choice
from torchlethe.components import RandomRelabel
from torchlethe.data import Feed, Joined, Sequential, model_input
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory, default_optimizer, logits_and_labels

Order = Literal["sequential", "joined"]


class RelabelledUpdate(LossUpdate):
    """Cross-entropy with random labels on the forget set and the true ones on the remaining data.

    Args:
        optimizer: makes the optimizer from the parameters.
        order: ``sequential``, in each epoch a pass over the forget set, then one over the remaining data; or
            ``joined``, batches of both shuffled together.
        labels: see :class:`~torchlethe.components.RandomRelabel`.
        redraw: likewise.
        seed: likewise.
        bn_mode: see :class:`~torchlethe.updates.LossUpdate`; batches of both roles cannot tell them apart, so
            ``remain`` needs the order ``sequential``.

    Attributes:
        relabel: the function from (batch, number of classes, step) to the labels to train on.

    Raises:
        ValueError: an argument is unknown.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        order: Order = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_choice(("sequential", "joined"), order=order)
        if order == "joined" and bn_mode == "remain":
            raise ValueError("bn_mode is 'remain', which needs order 'sequential': a joined batch holds both roles.")
        self.feed: Feed = Sequential() if order == "sequential" else Joined()
        self.relabel = RandomRelabel(labels, redraw, seed)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The relabelled cross-entropy, summed over the roles of which the step has a batch."""
        if "is_forget" in batch:
            return self._part(network, batch, k, "joined")
        parts = [self._part(network, batch[role], k, role) for role in ("forget", "remain") if role in batch]
        if not parts:
            raise ValueError(
                "a batch has neither `is_forget` nor the roles forget and remain: pass an UnlearningDataModule, or a "
                "dict with a loader for each role."
            )
        logs = {name: value for _, part in parts for name, value in part.items()}
        return torch.stack([loss for loss, _ in parts]).sum(), logs

    def _part(self, network: nn.Module, batch: Any, k: int, role: str) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = model_input(batch)
        with self.batch_norm(network, role):
            logits, labels = logits_and_labels(network, batch)
        if role == "remain":
            loss = F.cross_entropy(logits, labels)
            return loss, {"remain_loss": loss.detach()}
        random = self.relabel(batch, logits.shape[1], k)
        if role == "joined":
            random = torch.where(batch["is_forget"], random, labels)
        loss = F.cross_entropy(logits, random)
        logs: dict[str, Tensor | float] = {"relabelled_loss": loss.detach()}
        if role == "forget":
            logs["forget_loss"] = F.cross_entropy(logits.detach(), labels)
        return loss, logs
