"""The support-vector membership attack and the simple attack of the NeurIPS 2023 kit, on feature tensors.

They need scikit-learn, so they live here and not in ``torchlethe.functional``.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.functional.membership import fit_logistic

SVCMode = Literal["auto", "fast", "exact"]
Selection = Literal["seeded", "first"]

GRID = 2.5e-4


def choose_rows(available: int, count: int, *, selection: Selection = "seeded", seed: int = 0) -> Tensor:
    """Positions of ``count`` rows out of ``available``; all of them if there are no more.

    Args:
        available: number of rows.
        count: number of rows wanted.
        selection: ``seeded`` draws them without replacement by ``seed`` alone; ``first`` takes the first ones, which is
            what the published code does.
        seed: seed of the draw.

    Returns:
        (min(count, available),) int64, ascending.

    Example:
        >>> choose_rows(5, 3, selection="first")
        tensor([0, 1, 2])
    """
    check_choice(get_args(Selection), selection=selection)
    if count >= available or selection == "first":
        return torch.arange(min(count, available))
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def svc_membership(
    members: Tensor,
    non_members: Tensor,
    targets: Tensor,
    *,
    mode: SVCMode = "auto",
    C: float = 3.0,
    grid: float = GRID,
) -> float:
    """Fraction of ``targets`` that an RBF support-vector classifier predicts to be members.

    ``SVC(C=3, kernel="rbf", gamma=1/features)`` on members (1) and non-members (0), as published. The fit costs
    O(n²)…O(n³). ``fast`` first merges points that fall into one cell of width ``grid`` into one point at their mean,
    weighted by their number for each class; the kernel's width is 1, thousands of cells, so that the decision barely
    changes (on data without two points in a cell, not at all).

    Args:
        members: (M,) or (M, D) features of samples that were trained on.
        non_members: (N,) or (N, D).
        targets: (T,) or (T, D), the forget set.
        mode: ``exact``, ``fast`` (scalar features only), or ``auto``: fast for scalar features, else exact.
        C: penalty of the classifier.
        grid: width of a cell of the fast mode, in units of the feature.

    Returns:
        0…1, the fraction predicted **member**; SalUn's MIA-efficacy is one minus it.

    Raises:
        ValueError: a set is empty or not finite, the widths differ, or ``fast`` is asked for vectors.

    Example:
        >>> svc_membership(torch.tensor([0.9, 1.0, 0.95]), torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 0.0]))
        0.5
    """
    from sklearn.svm import SVC  # half a second of import that only this needs

    check_choice(get_args(SVCMode), mode=mode)
    arrays = []
    for name, features in (("members", members), ("non_members", non_members), ("targets", targets)):
        if features.ndim not in (1, 2) or not len(features) or not bool(features.isfinite().all()):
            raise ValueError(
                f"{name} must be finite features of at least one sample, (N,) or (N, D), got shape "
                f"{tuple(features.shape)}."
            )
        arrays.append(features.detach().double().cpu().reshape(len(features), -1).numpy())
    inside, outside, judged = arrays
    if not inside.shape[1] == outside.shape[1] == judged.shape[1]:
        widths = ", ".join(str(array.shape[1]) for array in arrays)
        raise ValueError(f"members, non_members and targets must have equally many features, got {widths}.")
    width = inside.shape[1]
    if mode == "fast" and width > 1:
        raise ValueError(f"mode='fast' merges scalar features only, got {width} features: use mode='exact'.")
    classifier = SVC(C=C, gamma="auto", kernel="rbf")
    labels = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    points = np.concatenate([inside, outside])
    if mode == "exact" or width > 1:
        classifier.fit(points, labels)
        return float(classifier.predict(judged).mean())
    points, labels, counts = _merge(points[:, 0], labels, grid)
    classifier.fit(points[:, None], labels, sample_weight=counts)
    # many outputs saturate to the same float: decide each value once
    values, inverse = np.unique(judged[:, 0], return_inverse=True)
    return float(classifier.predict(values[:, None])[inverse].mean())


def _merge(points: np.ndarray, labels: np.ndarray, grid: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, cell = np.unique(np.round(points / grid), return_inverse=True)
    centre = np.bincount(cell, weights=points) / np.bincount(cell)
    merged = []
    for label in (1.0, 0.0):
        counts = np.bincount(cell[labels == label], minlength=len(centre))
        used = counts > 0
        merged.append((centre[used], np.full(used.sum(), label), counts[used].astype(float)))
    return tuple(np.concatenate(parts) for parts in zip(*merged, strict=True))  # type: ignore[return-value]


def simple_membership(
    forget_losses: Tensor, test_losses: Tensor, *, splits: int = 10, seed: int = 123, selection: Selection = "seeded"
) -> list[float]:
    """Accuracies of the simple attack: logistic regression on the loss tells forget (1) from test samples (0).

    Both sets are cut to the size of the smaller one; ``splits`` stratified shuffle splits, nine tenths to fit and one
    to test; binomial logistic regression, C = 1, classes not weighted.

    Args:
        forget_losses: (F,) cross-entropies of the forget set, F ≥ 10.
        test_losses: (N,) cross-entropies of the test set, N ≥ 10.
        splits: number of splits.
        seed: random state of the splits (DeepUnlearn's is 123) and of the draw that equalises the sizes.
        selection: see :func:`choose_rows`.

    Returns:
        One accuracy in 0…1 for each split; the published number is their mean, and 0.5 is ideal.

    Raises:
        ValueError: a set has fewer than 10 samples or is not finite.

    Source:
        unlearning-challenge/starting-kit (``simple_mia``); xcadet/deepunlearn.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    for name, losses in (("forget_losses", forget_losses), ("test_losses", test_losses)):
        if losses.ndim != 1 or len(losses) < 10 or not bool(losses.isfinite().all()):
            raise ValueError(f"{name} must be at least 10 finite numbers, got shape {tuple(losses.shape)}.")
    size = min(len(forget_losses), len(test_losses))
    rows = [values.detach().double().cpu() for values in (test_losses, forget_losses)]
    rows = [values[choose_rows(len(values), size, selection=selection, seed=seed)] for values in rows]
    scores, is_forget = torch.cat(rows), torch.arange(2 * size) >= size
    accuracies = []
    splitter = StratifiedShuffleSplit(n_splits=splits, random_state=seed)
    for fit_rows, test_rows in splitter.split(scores[:, None].numpy(), is_forget.numpy()):
        train, test = torch.from_numpy(fit_rows), torch.from_numpy(test_rows)
        fit = fit_logistic(scores[train], is_forget[train], C=1.0, balanced=False)
        hits = fit.predict(scores[test]) == is_forget[test]
        accuracies.append(int(hits.sum()) / len(hits))
    return accuracies
