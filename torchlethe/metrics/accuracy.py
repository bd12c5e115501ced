"""Forget, remaining and test accuracy as one torchmetric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from torchlethe.arguments import check_choice
from torchlethe.functional.uncertainty import correctness


class RoleAccuracy(Metric):
    """Accuracy in percent on several sets: FA (forget), RA (remain), TA (test), and any other.

    Args:
        roles: the names of the sets.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict ``<role>_accuracy`` → float64 scalar in 0…100, NaN for a set without samples. For the forget set and the
        test set the aim is Retrain's value; the unlearning accuracy UA is 100 − FA. Counts are summed across ranks;
        padding (label −100) is not counted.

    Example:
        >>> metric = RoleAccuracy(("forget", "test"))
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), role="forget")
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, -100]), role="test")
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'forget_accuracy': 50.0, 'test_accuracy': 100.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    hits: Tensor
    seen: Tensor

    def __init__(self, roles: Sequence[str] = ("forget", "remain", "test"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not roles or len(set(roles)) != len(roles):
            raise ValueError(f"roles={tuple(roles)} must be distinct names, at least one.")
        self.roles = tuple(roles)
        self.add_state("hits", default=torch.zeros(len(self.roles), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seen", default=torch.zeros(len(self.roles), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, role: str) -> None:
        """Add a batch of one set.

        Args:
            logits: (B, K).
            labels: (B,) integers, −100 marks padding.
            role: one of ``roles``.

        Raises:
            ValueError: the role is unknown, or a shape or label is wrong.
        """
        check_choice(self.roles, role=role)
        right = correctness(logits.detach(), labels)
        self.hits[self.roles.index(role)] += int(right.sum())
        self.seen[self.roles.index(role)] += right.numel()

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of each set in percent."""
        percent = 100.0 * self.hits.double() / self.seen
        return {f"{role}_accuracy": value for role, value in zip(self.roles, percent, strict=True)}
