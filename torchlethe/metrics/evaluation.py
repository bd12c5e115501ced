"""All numbers of an unlearning evaluation from the logits of its sets, each passed through the model once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchlethe.functional import divergence
from torchlethe.functional.membership import indiscernibility, logistic_membership
from torchlethe.functional.uncertainty import Feature, ModifiedEntropy, accuracy, confidence, membership_feature
from torchlethe.metrics.membership import threshold_attack
from torchlethe.metrics.support_vectors import SVCMode, choose_rows, simple_membership, svc_membership

HEADLINE_MEMBERSHIP = ("entropy_logistic", "confidence_svc")
DIVERGENCES = ("kl", "js", "activation_distance", "completeness", "wasserstein1_confidence", "wasserstein1_loss")

_SCALARS = ("correctness", "confidence", "loss", "entropy", "m_entropy", "m_entropy_as_published")
MEMBERSHIP = (
    *(f"{feature}_{attack}" for attack in ("logistic", "svc", "svc_all", "threshold") for feature in _SCALARS),
    "probabilities_svc",
    "probabilities_svc_all",
    "simple",
)
"""Names of membership attacks: ``<feature>_<attack>``, or ``simple``; METRIC_DEFINITIONS says what each is."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on one evaluation set, without padding, in a fixed order.

    Attributes:
        logits: (N, K) floating point, on the CPU.
        labels: (N,) int64 in 0…K−1.
        index: (N,) int64, the samples' positions in their data set.
    """

    logits: Tensor
    labels: Tensor
    index: Tensor

    def at(self, rows: Tensor) -> Outputs:
        """The outputs of some rows, in their order."""
        return Outputs(self.logits[rows], self.labels[rows], self.index[rows])

    def confidence(self) -> Tensor:
        """(N,) float32 probability of the true label."""
        return _chunked(confidence, self.logits, self.labels).float()


def check_membership(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of membership attacks.

    Args:
        names: out of :data:`MEMBERSHIP`.

    Returns:
        The names as a tuple.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in names if name not in MEMBERSHIP]
    if unknown:
        raise ValueError(f"membership contains {unknown[0]!r}, allowed are {', '.join(MEMBERSHIP)}.")
    return tuple(names)


def unlearning_metrics(
    sets: Mapping[str, Outputs],
    *,
    membership: Sequence[str] = HEADLINE_MEMBERSHIP,
    svc_mode: SVCMode = "auto",
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of each set and the membership attacks on the forget set.

    Args:
        sets: outputs by set name; ``forget``, ``remain`` and ``test`` are what the attacks need, each further set adds
            its accuracy. Without one of the three the attacks are left out.
        membership: attacks out of :data:`MEMBERSHIP`.
        svc_mode: ``auto`` (fast for scalar features), ``fast`` or ``exact``.
        seed: seed of the choice of members for ``…_svc``, and of the splits of ``simple`` (its published value is 123).

    Returns:
        ``<set>_accuracy`` and ``mia_<attack>``, all in percent. Attacks are NaN where an output is not finite, as after
        a diverged run. Computed in float64.

    Example:
        >>> logits, labels = torch.eye(4, 2).repeat(5, 1), torch.tensor([0, 1, 0, 1] * 5)
        >>> sets = {name: Outputs(logits, labels, torch.arange(20)) for name in ("forget", "remain", "test")}
        >>> unlearning_metrics(sets, membership=["simple"], seed=123)["forget_accuracy"]
        75.0
    """
    metrics = {f"{name}_accuracy": accuracy(outputs.logits, outputs.labels) for name, outputs in sets.items()}
    roles = ("remain", "test", "forget")
    if not all(role in sets for role in roles):
        return metrics
    finite = all(bool(sets[role].logits.isfinite().all()) for role in roles)
    attacks = _Attacks({role: sets[role] for role in roles}, svc_mode, seed)
    for name in check_membership(membership):
        if name == "simple":
            value = attacks.simple() if finite else math.nan
            metrics["mia_simple"] = 100.0 * value
            metrics["mia_simple_indiscernibility"] = 100.0 * indiscernibility(value) if finite else math.nan
        else:
            metrics[f"mia_{name}"] = 100.0 * attacks(name) if finite else math.nan
    return metrics


def validation_attacks(
    sets: Mapping[str, Outputs],
    *,
    membership: Sequence[str] = HEADLINE_MEMBERSHIP,
    svc_mode: SVCMode = "auto",
    seed: int = 0,
) -> dict[str, float]:
    """The first membership attack with validation samples as non-members, to choose settings without the test set.

    Args:
        sets: outputs by set name.
        membership: attacks out of :data:`MEMBERSHIP`; the first one is run.
        svc_mode: as for :func:`unlearning_metrics`.
        seed: as for :func:`unlearning_metrics`.

    Returns:
        ``validation_mia_<attack>`` in percent; empty without a set ``validation`` or without attacks.
    """
    if not membership or any(role not in sets for role in ("forget", "remain", "validation")):
        return {}
    roles = {"forget": sets["forget"], "remain": sets["remain"], "test": sets["validation"]}
    found = unlearning_metrics(roles, membership=membership[:1], svc_mode=svc_mode, seed=seed)
    return {f"validation_{name}": value for name, value in found.items() if name.startswith("mia_")}


def divergence_metrics(
    outputs: Outputs, reference: Outputs, divergences: Sequence[str] = ("kl", "js")
) -> dict[str, float]:
    """Distances between two models' outputs on the same samples, usually Retrain's on the forget set.

    Args:
        outputs: of the judged model.
        reference: of the reference, same samples in the same order.
        divergences: out of :data:`DIVERGENCES`.

    Returns:
        ``kl_to_reference``, ``js_to_reference``, ``activation_distance``, ``completeness`` (percent),
        ``wasserstein1_confidence``, ``wasserstein1_loss``; NaN where an output is not finite.

    Raises:
        ValueError: a name is unknown or the samples differ.
    """
    unknown = [name for name in divergences if name not in DIVERGENCES]
    if unknown:
        raise ValueError(f"divergences contains {unknown[0]!r}, allowed are {', '.join(DIVERGENCES)}.")
    if not torch.equal(outputs.index, reference.index) or not torch.equal(outputs.labels, reference.labels):
        raise ValueError("the reference was evaluated on other samples than the model, or in another order.")
    metrics: dict[str, float] = {}
    finite = bool(outputs.logits.isfinite().all()) and bool(reference.logits.isfinite().all())
    for name in divergences:
        key = f"{name}_to_reference" if name in ("kl", "js") else name
        if not finite:
            metrics[key] = math.nan
        elif name.startswith("wasserstein1"):
            feature = cast(Feature, name.removeprefix("wasserstein1_"))
            metrics[key] = divergence.wasserstein1(_scores(outputs, feature), _scores(reference, feature))
        else:
            function = {
                "kl": divergence.kl_to_reference,
                "js": divergence.js_to_reference,
                "activation_distance": divergence.activation_distance,
                "completeness": divergence.completeness,
            }[name]
            mean = float(_chunked(function, outputs.logits, reference.logits).double().mean())
            metrics[key] = 100.0 * mean if name == "completeness" else mean
    return metrics


class _Attacks:
    """Runs attacks by name; each feature of each set is computed once."""

    def __init__(self, sets: Mapping[str, Outputs], svc_mode: SVCMode, seed: int) -> None:
        self.sets, self.svc_mode, self.seed = sets, svc_mode, seed
        self.cache: dict[tuple[str, str], Tensor] = {}

    def __call__(self, name: str) -> float:
        attack = next(a for a in ("svc_all", "logistic", "svc", "threshold") if name.endswith(f"_{a}"))
        feature = name.removesuffix(f"_{attack}")
        roles = ("remain", "test", "forget")
        members, outsiders, targets = (self.feature(feature, role) for role in roles)
        if attack == "logistic":
            return logistic_membership(members, outsiders, targets)
        if attack == "threshold":
            scored = [(self.feature(feature, role), self.sets[role].labels) for role in roles]
            return threshold_attack(feature, *scored, num_classes=self.sets["forget"].logits.shape[1])
        mode = "auto" if feature == "probabilities" else self.svc_mode
        if attack == "svc_all":
            return svc_membership(members, outsiders, targets, mode=mode)
        rows = choose_rows(len(members), len(outsiders), seed=self.seed)
        if feature == "m_entropy_as_published":  # depends on which labels occur among the chosen
            members = _scores(self.sets["remain"].at(rows), "m_entropy", "as_published")
        else:
            members = members[rows]
        return 1.0 - svc_membership(members, outsiders, targets, mode=mode)

    def feature(self, feature: str, role: str) -> Tensor:
        if (feature, role) not in self.cache:
            as_published = feature == "m_entropy_as_published"
            name = cast(Feature, "m_entropy" if as_published else feature)
            kind: ModifiedEntropy = "as_published" if as_published else "correct"
            self.cache[feature, role] = _scores(self.sets[role], name, kind)
        return self.cache[feature, role]

    def simple(self) -> float:
        accuracies = simple_membership(self.feature("loss", "forget"), self.feature("loss", "test"), seed=self.seed)
        return math.fsum(accuracies) / len(accuracies)


def _scores(outputs: Outputs, feature: Feature, m_entropy: ModifiedEntropy = "correct") -> Tensor:
    if feature == "m_entropy" and m_entropy == "as_published":  # needs the whole set at once
        return membership_feature(feature, outputs.logits.double(), outputs.labels, m_entropy=m_entropy)
    return _chunked(lambda *pair: membership_feature(feature, *pair), outputs.logits, outputs.labels)


def _chunked(function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor, rows: int = 1 << 15) -> Tensor:
    # float64 copies of a whole ImageNet's logits would not fit
    chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([function(*(t.double() if t.is_floating_point() else t for t in chunk)) for chunk in chunks])
