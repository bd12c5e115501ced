"""Base of the metrics that need the logits of several sets at once: members, non-members and the forget set."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from torchlethe.arguments import check_choice
from torchlethe.functional.uncertainty import PADDING_LABEL, drop_padding


class RoleLogits(Metric):
    """Collects logits and labels of the sets that a subclass names in ``roles``.

    Rows with label −100 (padding of a distributed sampler) are dropped. Where ``index`` is given, ``compute`` orders
    the rows by it and drops repeated ones, so that the result does not depend on batches or the number of ranks even
    for choices that depend on the order.

    Across ranks the states are concatenated by torchmetrics (``dist_reduce_fx="cat"``); each rank must have updated
    each role at least once, a batch of padding is enough. Computed in float64 on the CPU.
    """

    roles: ClassVar[tuple[str, ...]] = ("member", "non_member", "forget")
    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for role in self.roles:
            for part in ("logits", "labels", "index"):
                self.add_state(f"{role}_{part}", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, role: str, index: Tensor | None = None) -> None:
        """Add a batch of one set.

        Args:
            logits: (B, K).
            labels: (B,) integers, −100 marks padding.
            role: the set that the batch belongs to, one of ``roles``.
            index: (B,) the samples' positions in their data set, optional; give it always or never.

        Raises:
            ValueError: the role is unknown, or a shape or label is wrong.
        """
        check_choice(self.roles, role=role)
        kept_logits, kept_labels = drop_padding(logits.detach(), labels)
        if index is None:
            kept_index = kept_labels.new_full(kept_labels.shape, -1)
        elif index.shape == labels.shape:
            kept_index = index[labels != PADDING_LABEL].to(kept_labels)
        else:
            raise ValueError(f"index must have the shape of labels, {tuple(labels.shape)}, got {tuple(index.shape)}.")
        getattr(self, f"{role}_logits").append(kept_logits)
        getattr(self, f"{role}_labels").append(kept_labels)
        getattr(self, f"{role}_index").append(kept_index)

    def collected(self, role: str) -> tuple[Tensor, Tensor]:
        """Everything gathered of one set.

        Args:
            role: one of ``roles``.

        Returns:
            Logits (N, K) float64 and labels (N,) int64, on the CPU, ordered by index where it was given.

        Raises:
            ValueError: the set is empty.
        """
        parts = [getattr(self, f"{role}_{part}") for part in ("logits", "labels", "index")]
        if any(isinstance(part, list) and not part for part in parts):
            raise ValueError(f"{type(self).__name__} has received no batch with role='{role}'.")
        logits, labels, index = (dim_zero_cat(part).cpu() for part in parts)
        if not len(labels):
            raise ValueError(f"{type(self).__name__} has received no sample with role='{role}', only padding.")
        if bool((index >= 0).all()):
            rows = distinct_rows(index)
            logits, labels = logits[rows], labels[rows]
        return logits.double(), labels


def distinct_rows(index: Tensor) -> Tensor:
    """The rows that hold each index for the first time, ordered by index.

    Args:
        index: (N,) integers.

    Returns:
        (M,) int64 positions, M ≤ N.

    Example:
        >>> distinct_rows(torch.tensor([7, 3, 7, 5]))
        tensor([1, 3, 0])
    """
    ordered, rows = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return rows[first]
