"""What a universal perturbation does to predictions and features, as torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from torchlethe.arguments import check_at_least
from torchlethe.functional import neural_collapse as nc
from torchlethe.functional.uncertainty import PADDING_LABEL


class _Counts(Metric):
    """Hits and samples, summed over ranks."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    hits: Tensor
    seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seen", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _count(self, hit: Tensor, real: Tensor) -> None:
        self.hits += (hit & real).sum()
        self.seen += real.sum()

    def compute(self) -> Tensor:
        """The share in [0, 1] over all ranks, NaN without samples; float64."""
        return self.hits.double() / self.seen


class FoolingRatio(_Counts):
    """Share of images whose predicted class changes under the perturbation; true labels play no part.

    Args:
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in [0, 1].

    Example:
        >>> metric = FoolingRatio()
        >>> metric.update(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 0, 4]))
        >>> metric.compute().item()
        0.5
    """

    def update(self, prediction: Tensor, clean_prediction: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            prediction: (B,) classes of the perturbed images.
            clean_prediction: (B,) classes of the clean ones.
            labels: (B,) only to tell padding, which has the label −100.
        """
        real = torch.ones_like(prediction, dtype=torch.bool) if labels is None else labels != PADDING_LABEL
        self._count(prediction != clean_prediction, real)


class TargetSuccess(_Counts):
    """Share of images that are predicted as the target.

    Args:
        target: the class.
        exclude_target: leave out the images whose true class it is (TSR′); otherwise all count (TSR).
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in [0, 1].

    Example:
        >>> metric = TargetSuccess(1, exclude_target=True)
        >>> metric.update(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
        >>> metric.compute().item()
        0.5
    """

    def __init__(self, target: int, exclude_target: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if target < 0:
            raise ValueError(f"target is {target}, it must be a class number.")
        self.target, self.exclude_target = target, exclude_target

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add a batch of predictions (B,) and true labels (B,), −100 for padding."""
        real = labels != PADDING_LABEL
        if self.exclude_target:
            real = real & (labels != self.target)
        self._count(prediction == self.target, real)


class DominanceRatio(Metric):
    """How far a few classes take over: the share of the k most frequent predictions.

    Args:
        num_classes: K.
        ks: for which k; those above K count as K.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict ``dominance_<k>`` → float64 scalar in [0, 1], in the order of ``ks``. The histogram is :attr:`histogram`.

    Example:
        >>> metric = DominanceRatio(4, ks=(1, 4))
        >>> metric.update(torch.tensor([0, 0, 0, 2]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'dominance_1': 0.75, 'dominance_4': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    histogram: Tensor

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 3, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2 or any(k < 1 for k in ks):
            raise ValueError(f"num_classes is {num_classes} and ks {tuple(ks)}: at least 2 classes, each k at least 1.")
        self.num_classes, self.ks = num_classes, tuple(ks)
        self.add_state("histogram", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch of predictions (B,); ``labels`` only to tell padding."""
        weight = torch.ones_like(prediction) if labels is None else (labels != PADDING_LABEL).long()
        # no bincount: its length would have to be read back from the device
        self.histogram.scatter_add_(0, prediction, weight)

    def compute(self) -> dict[str, Tensor]:
        """The shares over all ranks."""
        ranked = self.histogram.double().sort(descending=True).values / self.histogram.sum()
        return {f"dominance_{k}": ranked[:k].sum() for k in self.ks}


class FeatureGathering(Metric):
    """How far features have gathered: mean cos(φ(x+v), φ(x)) and mean cos(φ(x+v), φ(m+v)), m the mean image.

    Args:
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict with ``cosine_to_clean`` and ``cosine_to_uap``, float64 in [−1, 1]; low and high when features gather.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    sums: Tensor
    seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", default=torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, clean_features: Tensor, uap_feature: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: (B, d) of the perturbed images.
            clean_features: (B, d).
            uap_feature: (1, d), the feature of the perturbation itself.
            labels: (B,), −100 for padding.
        """
        real = labels != PADDING_LABEL
        for place, other in enumerate((clean_features, uap_feature)):
            cosine = F.cosine_similarity(features.float(), other.float(), dim=1).double()
            self.sums[place] += cosine.masked_fill(~real, 0.0).sum()
        self.seen += real.sum()

    def compute(self) -> dict[str, Tensor]:
        """The means over all ranks."""
        clean, uap = self.sums / self.seen
        return {"cosine_to_clean": clean, "cosine_to_uap": uap}


class NeuralCollapse(Metric):
    """Neural-collapse statistics of features with any assignment of classes (Papyan, Han, Donoho, PNAS 2020).

    Class sums, counts and second moments are added up in float64, (K + d) · d numbers in all; NC4 needs the class means
    beforehand and therefore the features themselves, N · d numbers in their own precision.

    Args:
        num_classes: K.
        nearest: whether to measure NC4.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict of float64 scalars: ``nc1`` = tr(Σ_W Σ_B⁺)/K, ``nc1_ratio`` = tr Σ_W / tr Σ_B, ``nc2_norm``, ``nc2_angle``,
        ``nc3`` where the head was given, ``nc4`` (share of samples whose nearest class mean is not the given
        prediction), and ``classes_skipped``: classes with fewer than two samples, which are left out. NaN where fewer
        than two classes are left.

    Note:
        Sums are added over ranks; padding (label −100) counts nowhere.

    Example:
        >>> metric = NeuralCollapse(2)
        >>> corners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> metric.update(corners, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value.item(), 6) for name, value in metric.compute().items() if name != "classes_skipped"}
        {'nc1': 0.0, 'nc1_ratio': 0.0, 'nc2_norm': 0.0, 'nc2_angle': 0.0, 'nc4': 0.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    sums: Tensor
    counts: Tensor
    gram: Tensor
    features: list[Tensor]
    predictions: list[Tensor]

    def __init__(self, num_classes: int, nearest: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least(2, num_classes=num_classes)
        self.num_classes, self.nearest = num_classes, nearest
        self.head: Tensor | None = None
        # the width is known with the first batch
        self.add_state("sums", default=torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gram", default=torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("predictions", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, classes: Tensor, predictions: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: (B, d).
            classes: (B,) the assignment, −100 for padding.
            predictions: (B,) the classifier's predictions, for NC4; the assignment by default.
        """
        real = classes != PADDING_LABEL
        predictions = (classes if predictions is None else predictions)[real]
        features, classes = features.detach()[real], classes[real]
        if not self.sums.numel():
            width = features.shape[1]
            self.sums = torch.zeros(self.num_classes, width, dtype=torch.float64, device=features.device)
            self.gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        exact = features.double()
        self.sums.index_add_(0, classes, exact)
        self.gram += exact.T @ exact
        self.counts.index_add_(0, classes, torch.ones_like(classes))
        if self.nearest:
            self.features.append(features)
            self.predictions.append(predictions)

    def compute(self) -> dict[str, Tensor]:
        """The statistics over all ranks."""
        kept = self.counts >= nc.MINIMUM
        found: dict[str, Tensor] = {"classes_skipped": (~kept).sum().double()}
        nan = torch.full((), torch.nan, dtype=torch.float64, device=self.counts.device)
        if int(kept.sum()) < 2:
            names = ["nc1", "nc1_ratio", "nc2_norm", "nc2_angle", *(["nc4"] if self.nearest else [])]
            return dict.fromkeys(names, nan) | found
        within, centred = nc.within_between(self.sums, self.counts, self.gram)
        between = centred.square().sum() / len(centred)
        found = {
            "nc1": nc.within_class_variability(within, centred),
            "nc1_ratio": within.trace() / between,
            "nc2_norm": nc.equinorm(centred),
            "nc2_angle": nc.equiangularity(centred),
        } | found
        if self.head is not None:
            found["nc3"] = nc.self_duality(centred, self.head.double().to(centred.device)[kept])
        if self.nearest:
            features, predictions = dim_zero_cat(self.features), dim_zero_cat(self.predictions)
            means = nc.class_means(self.sums, self.counts)
            chunks = zip(features.split(8192), predictions.split(8192), strict=True)
            wrong = [(nc.nearest_means(part.double(), means, kept) != given).sum() for part, given in chunks]
            found["nc4"] = torch.stack(wrong).sum().double() / len(predictions)
        return found
