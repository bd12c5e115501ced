"""Membership attacks on a forget set as torchmetrics.

Two orientations are in use, and the classes keep that of their source: :class:`MembershipLogistic`,
:class:`BadTeacherMembership` and :class:`MembershipThreshold` return the fraction of the forget set predicted
**member**; :class:`MembershipSVC` returns the fraction predicted **non-member**. None has a fixed best value: Retrain's
value is the aim.
"""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.functional.membership import (
    class_thresholds,
    fraction,
    indiscernibility,
    logistic_membership,
    threshold_membership,
)
from torchlethe.functional.uncertainty import Feature, ModifiedEntropy, membership_feature, sample_loss
from torchlethe.metrics.roles import RoleLogits
from torchlethe.metrics.support_vectors import (
    GRID,
    Selection,
    SVCMode,
    choose_rows,
    simple_membership,
    svc_membership,
)


def threshold_attack(
    feature: str,
    members: tuple[Tensor, Tensor],
    non_members: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    *,
    num_classes: int,
) -> float:
    """Fraction of ``targets`` that one threshold on a feature for each class predicts to be members.

    Args:
        feature: name of the scalar feature, which says what speaks for membership: a high ``confidence``, being right
            (``correctness``, without a threshold), else a low value.
        members: (M,) features and (M,) labels of samples that were trained on.
        non_members: (N,) features and labels.
        targets: (T,) features and labels, the forget set.
        num_classes: K.

    Returns:
        0…1, the fraction predicted **member**.

    Example:
        >>> labels = torch.tensor([0, 0])
        >>> sure, unsure = (torch.tensor([0.1, 0.2]), labels), (torch.tensor([0.8, 0.9]), labels)
        >>> threshold_attack("entropy", sure, unsure, (torch.tensor([0.1, 0.7]), labels), num_classes=1)
        0.5
    """
    if feature == "correctness":
        return fraction(targets[0] > 0)
    sign = 1.0 if feature == "confidence" else -1.0
    (inside, inside_labels), (outside, outside_labels), (judged, judged_labels) = members, non_members, targets
    thresholds = class_thresholds(sign * inside, inside_labels, sign * outside, outside_labels, num_classes)
    return fraction(threshold_membership(sign * judged, judged_labels, thresholds))


class _FeatureMetric(RoleLogits):
    """Shared by the attacks that look at one feature of each sample."""

    vectors: ClassVar[bool] = False

    def __init__(self, feature: Feature, m_entropy: ModifiedEntropy = "correct", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        allowed = tuple(name for name in get_args(Feature) if self.vectors or name != "probabilities")
        check_choice(allowed, feature=feature)
        check_choice(get_args(ModifiedEntropy), m_entropy=m_entropy)
        self.feature: Feature = feature
        self.m_entropy: ModifiedEntropy = m_entropy

    def _features(self, role: str) -> Tensor:
        return membership_feature(self.feature, *self.collected(role), m_entropy=self.m_entropy)


class MembershipLogistic(_FeatureMetric):
    """SFRon's attack: logistic regression on the entropy; fraction of the forget set predicted **member**.

    Members are all remaining samples, non-members the test set; both classes weigh the same. The published
    multinomial fit with C = 1 equals the binomial fit with C = 2 used here
    (:func:`torchlethe.functional.membership.fit_logistic`).

    Args:
        feature: ``entropy`` (published), or another scalar feature of
            :func:`~torchlethe.functional.uncertainty.membership_feature`.
        m_entropy: which modified entropy ``feature="m_entropy"`` means.
        C: inverse regularisation strength.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in 0…1; the aim is Retrain's value (not 0, not ½).

    Source:
        ``K1nght/Unified-Unlearning-w-Remain-Geometry``, the “MIA” column of SFRon and DualOptim.

    Example:
        >>> metric = MembershipLogistic()
        >>> sure, unsure = torch.tensor([[6.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.2, 0.0]])
        >>> metric.update(sure, torch.tensor([0, 0]), role="member")
        >>> metric.update(unsure, torch.tensor([0, 1]), role="non_member")
        >>> metric.update(torch.tensor([[5.5, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]), role="forget")
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self, feature: Feature = "entropy", m_entropy: ModifiedEntropy = "correct", C: float = 2.0, **kwargs: Any
    ) -> None:
        super().__init__(feature, m_entropy, **kwargs)
        self.C = C

    def compute(self) -> Tensor:
        """Fraction of the forget set predicted member."""
        scores = [self._features(role) for role in self.roles]
        return torch.tensor(logistic_membership(*scores, C=self.C), dtype=torch.float64)


class MembershipSVC(_FeatureMetric):
    """SalUn's MIA-efficacy: an RBF support-vector classifier; fraction of the forget set predicted **non-member**.

    Members are as many remaining samples as there are test samples. The published code takes the first ones and
    computes the modified entropy in its own way; both are options, so that its tables can be reproduced with
    ``selection="first", m_entropy="as_published", mode="exact"``.

    Args:
        feature: ``confidence`` (the headline of the paper), ``correctness``, ``entropy``, ``m_entropy``, ``loss`` or
            ``probabilities`` (all K at once, needs the exact fit).
        m_entropy: which modified entropy ``feature="m_entropy"`` means.
        mode: ``fast`` merges scalar features on a grid (≥ 20 times faster on 2 × 10 000 points), ``exact`` does not,
            ``auto`` is fast where possible.
        selection: how members are chosen: ``seeded`` or ``first``. Give ``index`` to ``update`` for a choice that does
            not depend on the order of batches.
        seed: seed of the choice.
        grid: cell width of the fast mode.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in 0…1; the aim is Retrain's value.

    Source:
        ``SVC_MIA`` in OPTML-Group/Unlearn-Saliency.

    Example:
        >>> metric = MembershipSVC("confidence")
        >>> sure, unsure = torch.tensor([[6.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.2, 0.0]])
        >>> metric.update(sure, torch.tensor([0, 0]), role="member")
        >>> metric.update(unsure, torch.tensor([0, 0]), role="non_member")
        >>> metric.update(torch.tensor([[5.5, 0.0], [0.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0, 0]), role="forget")
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    vectors = True
    match_sizes: ClassVar[bool] = True

    def __init__(
        self,
        feature: Feature = "confidence",
        m_entropy: ModifiedEntropy = "correct",
        mode: SVCMode = "auto",
        selection: Selection = "seeded",
        seed: int = 0,
        grid: float = GRID,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, m_entropy, **kwargs)
        check_choice(get_args(SVCMode), mode=mode)
        check_choice(get_args(Selection), selection=selection)
        if mode == "fast" and feature == "probabilities":
            raise ValueError("mode='fast' merges scalar features only: use mode='exact' with feature='probabilities'.")
        self.mode: SVCMode = mode
        self.selection: Selection = selection
        self.seed = seed
        self.grid = grid

    def member_fraction(self) -> float:
        """Fraction of the forget set predicted member, by this rank's states."""
        (logits, labels), non_members = self.collected("member"), self._features("non_member")
        if self.match_sizes:
            rows = choose_rows(len(labels), len(non_members), selection=self.selection, seed=self.seed)
            logits, labels = logits[rows], labels[rows]
        members = membership_feature(self.feature, logits, labels, m_entropy=self.m_entropy)
        return svc_membership(members, non_members, self._features("forget"), mode=self.mode, grid=self.grid)

    def compute(self) -> Tensor:
        """Fraction of the forget set predicted non-member."""
        return torch.tensor(1.0 - self.member_fraction(), dtype=torch.float64)


class BadTeacherMembership(MembershipSVC):
    """The attack of the bad-teacher code: the same classifier; fraction of the forget set predicted **member**.

    On the entropy, with *all* remaining samples as members.

    Args:
        feature: ``entropy`` (published) or another one of :class:`MembershipSVC`.
        m_entropy: which modified entropy ``feature="m_entropy"`` means.
        mode: ``auto``, ``fast`` or ``exact``.
        grid: cell width of the fast mode.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in 0…1; the aim is Retrain's value.

    Source:
        ``get_membership_attack_prob`` in vikram2000b/bad-teaching-unlearning.
    """

    match_sizes = False

    def __init__(
        self,
        feature: Feature = "entropy",
        m_entropy: ModifiedEntropy = "correct",
        mode: SVCMode = "auto",
        grid: float = GRID,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, m_entropy, mode, grid=grid, **kwargs)

    def compute(self) -> Tensor:
        """Fraction of the forget set predicted member."""
        return torch.tensor(self.member_fraction(), dtype=torch.float64)


class MembershipThreshold(_FeatureMetric):
    """Song and Mittal's attack: one threshold for each class; fraction of the forget set predicted **member**.

    The thresholds maximise the balanced accuracy between remaining and test samples. Entropies and losses are negated,
    so that a larger score always speaks for membership. ``feature="correctness"`` needs no threshold: right means
    member.

    Args:
        feature: ``confidence``, ``entropy``, ``m_entropy``, ``loss`` or ``correctness``.
        m_entropy: which modified entropy ``feature="m_entropy"`` means; published thresholds use the correct one.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        float64 scalar in 0…1; the aim is Retrain's value.

    Source:
        Song, Mittal (USENIX Security 2021); ``MIA.py`` in OPTML-Group/Unlearn-Saliency.
    """

    def __init__(self, feature: Feature = "confidence", m_entropy: ModifiedEntropy = "correct", **kwargs: Any) -> None:
        super().__init__(feature, m_entropy, **kwargs)

    def compute(self) -> Tensor:
        """Fraction of the forget set predicted member."""
        sets = [self.collected(role) for role in self.roles]
        scored = [
            (membership_feature(self.feature, logits, labels, m_entropy=self.m_entropy), labels)
            for logits, labels in sets
        ]
        classes = sets[-1][0].shape[1]
        return torch.tensor(threshold_attack(self.feature, *scored, num_classes=classes), dtype=torch.float64)


class SimpleMembership(RoleLogits):
    """The attack of the NeurIPS 2023 unlearning challenge's kit: accuracy of telling forget from test losses.

    Logistic regression on the cross-entropy, balanced by number, mean over ten splits
    (:func:`~torchlethe.metrics.support_vectors.simple_membership`). No members are needed.

    Args:
        splits: number of stratified shuffle splits.
        seed: random state of the splits and of the draw that equalises the sizes.
        selection: how the larger set is cut: ``seeded`` or ``first``.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Dict of float64 scalars: ``accuracy`` in 0…1 (0.5 is ideal) and ``indiscernibility`` = 1 − |accuracy − ½| / ½ in
        0…1 (higher is better).
    """

    roles = ("forget", "non_member")

    def __init__(self, splits: int = 10, seed: int = 123, selection: Selection = "seeded", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice(get_args(Selection), selection=selection)
        self.splits = splits
        self.seed = seed
        self.selection: Selection = selection

    def compute(self) -> dict[str, Tensor]:
        """Mean accuracy of the attack and the indiscernibility made of it."""
        losses = [sample_loss(*self.collected(role)) for role in self.roles]
        accuracies = simple_membership(*losses, splits=self.splits, seed=self.seed, selection=self.selection)
        mean = torch.tensor(accuracies, dtype=torch.float64).mean()
        return {"accuracy": mean, "indiscernibility": mean.new_tensor(indiscernibility(float(mean)))}
