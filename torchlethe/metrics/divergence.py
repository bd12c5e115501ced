"""Distances between a model's and a reference's outputs as torchmetrics; update with the logits of both.

All take ``labels`` only to drop padding rows (−100). Sums are kept in float64 and added across ranks.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from torchlethe.arguments import check_choice
from torchlethe.functional import divergence
from torchlethe.functional.uncertainty import confidence, sample_loss
from torchlethe.metrics.pairs import MeanOverPairs


class DivergenceToReference(MeanOverPairs):
    """KL(reference ‖ model) or Jensen–Shannon divergence, mean over samples; lower is closer.

    Args:
        kind: ``kl`` (nats, ≥ 0) or ``js`` (nats, 0…log 2).
        eps: added inside the logarithms, as published.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar; 0 for equal outputs.

    Example:
        >>> metric = DivergenceToReference("kl")
        >>> metric.update(torch.zeros(2, 4), torch.zeros(2, 4))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    def __init__(self, kind: Literal["kl", "js"] = "kl", eps: float = 1e-20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice(("kl", "js"), kind=kind)
        self.kind = kind
        self.eps = eps

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        function = divergence.kl_to_reference if self.kind == "kl" else divergence.js_to_reference
        return function(logits, reference_logits, labels, eps=self.eps)


class ZeroRetrainForgetting(MeanOverPairs):
    """ZRF = 1 − mean JS' to a randomly initialised network; at most 1, which is an untrained network's value.

    Update with the logits of the model and of a network of the same architecture with random weights. Compare with
    Retrain's value; more is not better (:func:`~torchlethe.functional.divergence.zero_retrain_forgetting`).
    """

    higher_is_better = None

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        return divergence.js_bad_teacher(logits, reference_logits, labels)

    def compute(self) -> Tensor:
        """One minus the mean over all samples of all ranks."""
        return 1.0 - super().compute()


class ActivationDistance(MeanOverPairs):
    """Mean Euclidean distance of the two models' probability vectors, in 0…√2; lower is closer."""

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        return divergence.activation_distance(logits, reference_logits, labels)


class Completeness(MeanOverPairs):
    """Percentage of samples for which both models predict the same class, 0…100; higher is closer."""

    higher_is_better = True

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        return 100.0 * divergence.completeness(logits, reference_logits, labels).double()


class Wasserstein1(Metric):
    """Wasserstein-1 distance between two models' confidences (or losses) on the same set; lower is closer.

    Compares the two *distributions*. The states are the samples' scores, concatenated across ranks.

    Args:
        feature: ``confidence`` (p_y; the distance lies in 0…1) or ``loss`` (−log p_y in nats).
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar, ≥ 0.

    Example:
        >>> metric = Wasserstein1()
        >>> labels = torch.tensor([0, 1])
        >>> metric.update(torch.zeros(2, 2), torch.zeros(2, 2), labels)
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    scores: list[Tensor]
    reference_scores: list[Tensor]

    def __init__(self, feature: Literal["confidence", "loss"] = "confidence", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice(get_args(Literal["confidence", "loss"]), feature=feature)
        self.feature = feature
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("reference_scores", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K) of the judged model.
            reference_logits: (B, K) of the reference on the same images.
            labels: (B,) integers, −100 marks padding.

        Raises:
            ValueError: a shape or label is wrong.
        """
        function = confidence if self.feature == "confidence" else sample_loss
        self.scores.append(function(logits.detach().double(), labels))
        self.reference_scores.append(function(reference_logits.detach().double(), labels))

    def compute(self) -> Tensor:
        """Distance between the two distributions over all ranks."""
        value = divergence.wasserstein1(dim_zero_cat(self.scores), dim_zero_cat(self.reference_scores))
        return torch.tensor(value, dtype=torch.float64)
