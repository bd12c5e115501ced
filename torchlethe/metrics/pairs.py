"""The mean over samples of a number that a model's and a reference's logits give for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOverPairs(Metric):
    """Mean over samples of what ``_values`` returns for each; a float64 sum and a count, added across ranks."""

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def update(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, K) of the judged model.
            reference_logits: (B, K) of the reference on the same images.
            labels: (B,), only to drop padding (−100).

        Raises:
            ValueError: a shape or label is wrong.
        """
        values = self._values(logits.detach().double(), reference_logits.detach().double(), labels)
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Mean over all samples of all ranks; NaN without samples."""
        return self.total / self.count
