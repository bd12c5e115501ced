"""Everything that is measured about a universal perturbation in one pass, under one set of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from torchlethe.functional.uncertainty import PADDING_LABEL
from torchlethe.metrics.universal import (
    DominanceRatio,
    FeatureGathering,
    FoolingRatio,
    NeuralCollapse,
    TargetSuccess,
)

ASSIGNMENTS = ("clean", "attacked_true", "attacked_predicted")


class AttackMetrics(nn.Module):
    """The metrics of an attack on one data set.

    Args:
        num_classes: K.
        target: class of a targeted attack.
        features: whether the cosines of features are measured.
        collapse: whether neural collapse is, for clean features with true labels, attacked ones with true labels and
            attacked ones with predicted labels.
    """

    def __init__(
        self, num_classes: int, target: int | None = None, features: bool = False, collapse: bool = False
    ) -> None:
        super().__init__()
        accuracy = {"num_classes": num_classes, "average": "micro", "ignore_index": PADDING_LABEL}
        metrics: dict[str, Metric] = {
            "fooling_ratio": FoolingRatio(),
            "clean_accuracy": MulticlassAccuracy(**accuracy),  # type: ignore[arg-type]
            "accuracy": MulticlassAccuracy(**accuracy),  # type: ignore[arg-type]
            "dominance": DominanceRatio(num_classes),
        }
        if target is not None:
            metrics["target_success"] = TargetSuccess(target)
            metrics["target_success_others"] = TargetSuccess(target, exclude_target=True)
        if features:
            metrics["gathering"] = FeatureGathering()
        if collapse:
            metrics |= {f"collapse_{name}": NeuralCollapse(num_classes) for name in ASSIGNMENTS}
        self.metrics = nn.ModuleDict(metrics)
        self.wants_features = features or collapse

    def update(
        self,
        logits: Tensor,
        clean_prediction: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        clean_features: Tensor | None = None,
        uap_feature: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            logits: (B, K) of the perturbed images.
            clean_prediction: (B,) classes of the clean ones.
            labels: (B,) true classes, −100 for padding.
            features: (B, d) of the perturbed images, where features are measured.
            clean_features: (B, d).
            uap_feature: (1, d), the feature of the perturbation itself.
        """
        prediction = logits.argmax(1)
        m: Any = self.metrics
        m["fooling_ratio"].update(prediction, clean_prediction, labels)
        m["clean_accuracy"].update(clean_prediction, labels)
        m["accuracy"].update(prediction, labels)
        m["dominance"].update(prediction, labels)
        for name in ("target_success", "target_success_others"):
            if name in m:
                m[name].update(prediction, labels)
        if "gathering" in m:
            m["gathering"].update(features, clean_features, uap_feature, labels)
        if "collapse_clean" in m:
            predicted = prediction.masked_fill(labels == PADDING_LABEL, PADDING_LABEL)
            m["collapse_clean"].update(clean_features, labels, clean_prediction)
            m["collapse_attacked_true"].update(features, labels, prediction)
            m["collapse_attacked_predicted"].update(features, predicted, prediction)

    def use_head(self, weight: Tensor | None) -> None:
        """Give the neural-collapse metrics the classifier's weight (K, d), for NC3."""
        for name in ASSIGNMENTS:
            if f"collapse_{name}" in self.metrics:
                self.metrics[f"collapse_{name}"].head = weight  # type: ignore[assignment]

    def compute(self) -> dict[str, Tensor]:
        """All numbers by name, shares in [0, 1]."""
        found: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            value = metric.compute()  # type: ignore[operator]
            if isinstance(value, Mapping):
                suffix = name.removeprefix("collapse") if name.startswith("collapse") else ""
                found |= {f"{key}{suffix}": item for key, item in value.items()}
            else:
                found[name] = value
        return found

    def histogram(self) -> Tensor:
        """(K,) predictions on the perturbed images that this rank has seen."""
        return self.metrics["dominance"].histogram  # type: ignore[return-value]

    def reset(self) -> None:
        """Forget everything."""
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]


def uap_classes(logits: Tensor, histogram: Tensor, ks: tuple[int, ...] = (1, 3, 5)) -> dict[str, Tensor]:
    """The class of the perturbation itself, and whether it is among the most frequent predictions.

    Args:
        logits: (1, K) of v + m, m the mean image.
        histogram: (K,) predictions on perturbed images.
        ks: for which k.

    Returns:
        ``uap_class``, and ``uap_in_top_<k>`` (0 or 1), float64 scalars.
    """
    own = logits[0].argmax()
    order = histogram.argsort(descending=True, stable=True)
    return {"uap_class": own.double()} | {f"uap_in_top_{k}": (order[:k] == own).any().double() for k in ks}
