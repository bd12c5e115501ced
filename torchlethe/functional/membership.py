"""Membership attacks on one real-valued score: logistic regression and thresholds, in torch alone.

Every attack learns to tell samples that were trained on (members: remaining data) from samples that were not (test
data) by a score of the model's output, then judges the forget set. All functions here return the fraction predicted
**member** unless they say otherwise: 1 means that the model still treats the forget set as training data. Neither 0 nor
½ is the aim: a model retrained without the forget set generalises to it, so compare with Retrain's value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchlethe.arguments import check_above, check_within


class LogisticFit(NamedTuple):
    """Logistic regression on one score: P(member | s) = sigmoid(coefficient · s + intercept)."""

    coefficient: float
    intercept: float
    iterations: int

    def predict(self, scores: Tensor) -> Tensor:
        """Whether each score is predicted to belong to a member; ties are non-members, as in scikit-learn.

        Args:
            scores: (N,) real numbers.

        Returns:
            (N,) booleans.
        """
        return self.coefficient * scores.double() + self.intercept > 0


def fit_logistic(
    scores: Tensor,
    is_member: Tensor,
    *,
    C: float = 2.0,
    balanced: bool = True,
    tolerance: float = 1e-12,
    max_iterations: int = 100,
) -> LogisticFit:
    """Fit logistic regression on one score by Newton's method in closed form.

    Minimises C Σ_i w_i log(1 + exp(−t_i (β s_i + b))) + ½ β² with t_i = ±1 and, if ``balanced``, w_i = N / (2 N_class),
    as ``sklearn.linear_model.LogisticRegression(C=C, class_weight="balanced")`` does; the intercept is not penalised.
    The 2×2 Newton system is solved directly, a few milliseconds for 10⁵ points.

    SFRon's code fits scikit-learn's former ``multi_class="multinomial"`` with C=1. For two classes that has weights ±w
    with the penalty ½ (w² + w²), so β = 2w and the penalty is β²/4: exactly this binomial fit with **C = 2** (the
    default), whose coefficient is twice theirs. The plain binomial C = 1 of today's scikit-learn is another model.

    Args:
        scores: (N,) real numbers, computed on in float64.
        is_member: (N,) booleans, both values present.
        C: inverse regularisation strength, > 0.
        balanced: whether both classes get the same total weight.
        tolerance: stop when the gradient, divided by the total weight, is this small.
        max_iterations: upper bound of Newton steps; about ten are needed.

    Returns:
        Coefficient, intercept and the number of iterations.

    Raises:
        ValueError: shapes differ, a score is not finite, a class is absent, or C is not positive.

    Example:
        >>> fit = fit_logistic(torch.tensor([0.1, 0.2, 0.9, 1.0]), torch.tensor([True, True, False, False]))
        >>> fit.predict(torch.tensor([0.0, 0.5, 0.6]))
        tensor([ True,  True, False])
    """
    if scores.ndim != 1 or scores.shape != is_member.shape:
        raise ValueError(
            f"scores and is_member must be one-dimensional of equal length, got {tuple(scores.shape)} and "
            f"{tuple(is_member.shape)}."
        )
    check_above(0, C=C)
    s, t = scores.detach().double(), is_member.to(scores.device).double()
    members, total = float(t.sum()), float(len(t))
    if not 0 < members < total:
        raise ValueError(f"both members and non-members are needed, got {int(members)} members among {int(total)}.")
    if not bool(s.isfinite().all()):
        raise ValueError("scores contain NaN or infinity: the model's outputs are not finite.")
    weight = torch.where(t > 0, total / (2 * members), total / (2 * (total - members))) if balanced else t.new_ones(())
    weight = weight.expand_as(t) / total
    mean, scale = float(s.mean()), float(s.std(unbiased=False))
    if scale <= 1e-15 * max(1.0, abs(mean)):
        odds = 0.0 if balanced else math.log(members / (total - members))
        return LogisticFit(0.0, odds, 0)
    # standardised scores make the 2×2 system well conditioned; the penalty on β = slope / scale is carried along
    x, ridge = (s - mean) / scale, 1.0 / (C * total * scale**2)

    def objective(slope: float, offset: float) -> float:
        z = slope * x + offset
        loss = torch.nn.functional.softplus(torch.where(t > 0, -z, z))
        return float((weight * loss).sum()) + 0.5 * ridge * slope**2

    slope = offset = 0.0
    value = objective(slope, offset)
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        p = torch.sigmoid(slope * x + offset)
        residual, curvature = weight * (p - t), weight * p * (1 - p)
        g0, g1 = float((residual * x).sum()) + ridge * slope, float(residual.sum())
        if max(abs(g0), abs(g1)) < tolerance:
            break
        h00 = float((curvature * x * x).sum()) + ridge
        h01, h11 = float((curvature * x).sum()), float(curvature.sum()) + 1e-300
        determinant = h00 * h11 - h01 * h01
        d0, d1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        descent, step = g0 * d0 + g1 * d1, 1.0
        # halve the step until it helps: Newton overshoots where nearly separated data make the loss flat; the slack is
        # what float64 resolves, so that the last steps towards the optimum are not refused
        slack = 1e-14 * (1.0 + value)
        while step > 1e-10 and objective(slope - step * d0, offset - step * d1) > value - 1e-4 * step * descent + slack:
            step *= 0.5
        if step <= 1e-10:  # no further progress possible in float64
            break
        slope, offset = slope - step * d0, offset - step * d1
        value = objective(slope, offset)
    coefficient = slope / scale
    return LogisticFit(coefficient, offset - coefficient * mean, iterations)


def logistic_membership(members: Tensor, non_members: Tensor, targets: Tensor, *, C: float = 2.0) -> float:
    """Fraction of ``targets`` that a logistic regression on one score predicts to be members.

    The membership attack of SFRon's protocol when the score is the entropy, ``members`` are all remaining samples and
    ``non_members`` the test set (:func:`fit_logistic` with balanced classes).

    Args:
        members: (M,) scores of samples that were trained on.
        non_members: (N,) scores of samples that were not.
        targets: (T,) scores of the forget set, T ≥ 1.
        C: inverse regularisation strength; 2 equals the published multinomial fit with C = 1.

    Returns:
        0…1, the fraction predicted **member**; compare with Retrain's value.

    Raises:
        ValueError: a set is empty or a score is not finite.
    """
    check_scores(members=members, non_members=non_members, targets=targets)
    is_member = torch.arange(len(members) + len(non_members)) < len(members)
    fit = fit_logistic(torch.cat([members.double(), non_members.double()]), is_member.to(members.device), C=C)
    return fraction(fit.predict(targets))


def best_threshold(members: Tensor, non_members: Tensor) -> float:
    """The threshold of the rule “score ≥ threshold ⇒ member” with the largest ½ (TPR + TNR).

    Candidates are the scores themselves, members first; the first best wins, as in the published loop over all values.
    Sorting replaces that O(n²) loop by O(n log n).

    Args:
        members: (M,) scores, higher for members, M ≥ 1.
        non_members: (N,) scores, N ≥ 1.

    Returns:
        The threshold.

    Raises:
        ValueError: a set is empty.

    Source:
        ``_thre_setting`` in inspire-group/membership-inference-evaluation, reused by SalUn's ``MIA.py``.

    Example:
        >>> best_threshold(torch.tensor([4.0, 3.0, 1.0]), torch.tensor([2.0, 0.5]))
        3.0
    """
    check_scores(members=members, non_members=non_members)
    members, non_members = members.double(), non_members.double()
    candidates = torch.cat([members, non_members])
    hit = (len(members) - torch.searchsorted(members.sort().values, candidates)).double() / len(members)
    reject = torch.searchsorted(non_members.sort().values, candidates).double() / len(non_members)
    balanced = 0.5 * (hit + reject)
    # argmax promises no order among equal values
    return float(candidates[(balanced == balanced.max()).nonzero()[0, 0]])


def class_thresholds(
    member_scores: Tensor,
    member_labels: Tensor,
    non_member_scores: Tensor,
    non_member_labels: Tensor,
    num_classes: int,
) -> Tensor:
    """One :func:`best_threshold` for each class.

    A class that lacks members or non-members (the forgotten class of a whole-class request has no members left) gets
    the threshold of all classes together; the published code would use 0 there, which decides nothing.

    Args:
        member_scores: (M,) scores, higher for members.
        member_labels: (M,) classes.
        non_member_scores: (N,).
        non_member_labels: (N,).
        num_classes: K.

    Returns:
        (K,) float64 thresholds.
    """
    common = best_threshold(member_scores, non_member_scores)
    thresholds = []
    for label in range(num_classes):
        inside, outside = member_scores[member_labels == label], non_member_scores[non_member_labels == label]
        thresholds.append(best_threshold(inside, outside) if len(inside) and len(outside) else common)
    return torch.tensor(thresholds, dtype=torch.float64)


def threshold_membership(scores: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Whether each score reaches its class's threshold, i.e. is predicted to belong to a member.

    Args:
        scores: (T,) scores, higher for members.
        labels: (T,) classes.
        thresholds: (K,) from :func:`class_thresholds`.

    Returns:
        (T,) booleans. Their mean over target members is the true-positive rate, one minus their mean over target
        non-members the true-negative rate; the attack's balanced accuracy is the mean of both.

    Example:
        >>> thresholds = torch.tensor([0.5, 0.9])
        >>> threshold_membership(torch.tensor([0.6, 0.6]), torch.tensor([0, 1]), thresholds)
        tensor([ True, False])
    """
    return scores.double() >= thresholds.to(scores.device)[labels]


def indiscernibility(attack_accuracy: float) -> float:
    """1 − |accuracy − ½| / ½: how little an attack can tell apart.

    Args:
        attack_accuracy: accuracy of a balanced attack, 0…1.

    Returns:
        0…1; 1 where the attack guesses, 0 where it is always right (or always wrong).

    Example:
        >>> indiscernibility(0.75)
        0.5
    """
    check_within(0, 1, attack_accuracy=attack_accuracy)
    return 1.0 - abs(attack_accuracy - 0.5) / 0.5


def fraction(flags: Tensor) -> float:
    """The share of true values as an exact quotient of counts; NaN without any.

    Args:
        flags: (N,) booleans.
    """
    return int(flags.sum()) / len(flags) if len(flags) else math.nan


def check_scores(**sets: Tensor) -> None:
    """Refuse empty, not finite or oddly shaped sets of scores, in one sentence.

    Raises:
        ValueError: naming the set.
    """
    for name, scores in sets.items():
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be a non-empty one-dimensional tensor, got shape {tuple(scores.shape)}.")
        if not bool(scores.isfinite().all()):
            raise ValueError(f"{name} contain NaN or infinity: the model's outputs are not finite.")
