"""Sample by sample and class by class against a reference, as torchmetrics; update with the logits of both.

``Completeness`` (the same predicted class) is in :mod:`torchlethe.metrics.divergence`. Rows with label −100 (padding of
a distributed sampler) are dropped. Counts are summed across ranks, moments are merged by torchmetrics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import PearsonCorrCoef

from torchlethe.functional.agreement import correctness_agreement
from torchlethe.functional.divergence import paired_logits
from torchlethe.functional.over_forgetting import class_drops, class_hits
from torchlethe.functional.uncertainty import confidence, drop_padding
from torchlethe.metrics.pairs import MeanOverPairs


class CorrectnessAgreement(MeanOverPairs):
    """Percentage of samples on which both models are right or both are wrong, 0…100; higher is closer.

    Needs labels. NaN without samples.

    Example:
        >>> metric = CorrectnessAgreement()
        >>> metric.update(torch.eye(3), torch.eye(3).roll(1, dims=1), torch.tensor([0, 0, 2]))
        >>> metric.compute()
        tensor(33.3333, dtype=torch.float64)
    """

    higher_is_better = True

    def _values(self, logits: Tensor, reference_logits: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("labels is None, but whether a model is right needs them.")
        ours, theirs = paired_logits(logits, reference_logits, labels)
        _, kept = drop_padding(logits, labels)
        return 100.0 * correctness_agreement(ours.argmax(dim=1), theirs.argmax(dim=1), kept).double()


class ConfidenceCorrelation(PearsonCorrCoef):
    """Pearson's correlation of both models' probabilities of the true label over samples, −1…1; higher is closer.

    A thin shell over :class:`torchmetrics.regression.PearsonCorrCoef`, in float64.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)

    def update(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            logits: (B, K) of the judged model.
            reference_logits: (B, K) of the reference on the same images.
            labels: (B,) integers, −100 marks padding.

        Raises:
            ValueError: a shape or label is wrong.
        """
        ours, theirs = (confidence(side.detach().double(), labels) for side in (logits, reference_logits))
        if len(ours):
            super().update(ours, theirs)


class OverForgetting(Metric):
    """How far classes fall below the reference's accuracy: mean and worst over the classes that are to be kept.

    Args:
        num_classes: K.
        forgotten: classes that do not count, for requests of whole classes.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict of float64 scalars in points: ``class_drop``, the mean over classes of max(0, drop), and
        ``worst_class_drop``. NaN without samples of a class that counts; lower is better.

    Raises:
        ValueError: a forgotten class lies outside 0…K−1.

    Example:
        >>> metric = OverForgetting(2)
        >>> metric.update(torch.eye(2)[[0, 0]], torch.eye(2), torch.tensor([0, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'class_drop': 50.0, 'worst_class_drop': 100.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    hits: Tensor
    reference_hits: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, forgotten: tuple[int, ...] | list[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        wrong = [number for number in forgotten if not 0 <= number < num_classes]
        if wrong:
            raise ValueError(f"forgotten contains {wrong[0]}, but must hold numbers from 0 to {num_classes - 1}.")
        self.num_classes = num_classes
        self.forgotten = tuple(forgotten)
        for name in ("hits", "reference_hits", "seen"):
            self.add_state(name, default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K) of the judged model.
            reference_logits: (B, K) of the reference on the same images.
            labels: (B,) integers, −100 marks padding.

        Raises:
            ValueError: a shape or label is wrong.
        """
        for side, name in ((logits, "hits"), (reference_logits, "reference_hits")):
            if side.ndim != 2 or side.shape[1] != self.num_classes:
                raise ValueError(f"logits must have {self.num_classes} columns, got shape {tuple(side.shape)}.")
            hits, seen = class_hits(side.detach(), labels)
            setattr(self, name, getattr(self, name) + hits)
        self.seen = self.seen + seen

    def compute(self) -> dict[str, Tensor]:
        """Mean and worst drop over all samples of all ranks."""
        kept = torch.ones(self.num_classes, dtype=torch.bool, device=self.seen.device)
        kept[list(self.forgotten)] = False
        own, reference = (100.0 * hits.double() / self.seen for hits in (self.hits, self.reference_hits))
        drops = class_drops(own, reference, kept)
        values = {"class_drop": drops.mean, "worst_class_drop": drops.worst}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
