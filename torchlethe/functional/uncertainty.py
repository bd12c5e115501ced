"""What a classifier's output says about one sample: confidence, loss, correctness, entropy and modified entropy.

These per-sample numbers are what membership attacks look at. Everything is computed from logits by ``log_softmax``, in
the dtype of the logits (pass float64 for numbers that agree with the published code to 1e-14). Rows whose label is
:data:`PADDING_LABEL` are duplicates that a distributed sampler added: they are dropped, not scored.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from torchlethe.arguments import check_choice

PADDING_LABEL = -100
"""Label of a padding duplicate: the ``ignore_index`` of ``cross_entropy`` and what torchmetrics is told to ignore."""

LOG_FLOOR = 1e-30

Feature = Literal["correctness", "confidence", "loss", "entropy", "m_entropy", "probabilities"]
ModifiedEntropy = Literal["correct", "as_published"]


def drop_padding(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check a batch of logits and labels and remove the padding rows.

    Args:
        logits: (B, K) floating point, K ≥ 2.
        labels: (B,) integers in 0…K−1, or −100 for padding.

    Returns:
        Logits (N, K) and labels (N,) int64 of the N real samples, in their order.

    Raises:
        ValueError: a shape is wrong or a label lies outside 0…K−1.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor (samples, classes) with at least 2 classes, got shape "
            f"{tuple(logits.shape)} and dtype {logits.dtype}."
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one integer for each of the {logits.shape[0]} rows of logits, got shape "
            f"{tuple(labels.shape)} and dtype {labels.dtype}."
        )
    real = labels != PADDING_LABEL
    logits, labels = logits[real], labels[real].long()
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise ValueError(
            f"labels must lie in 0…{logits.shape[1] - 1} (or be {PADDING_LABEL} for padding), got values from "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    return logits, labels


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the most probable class is the label.

    Args:
        logits: (B, K).
        labels: (B,), −100 marks padding.

    Returns:
        (N,) zeros and ones in the dtype of ``logits``; higher speaks for membership.
    """
    logits, labels = drop_padding(logits, labels)
    return (logits.argmax(dim=1) == labels).to(logits.dtype)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in percent, 0…100 (NaN without samples): FA, RA or TA, depending on the set.

    Args:
        logits: (B, K).
        labels: (B,), −100 marks padding.

    Example:
        >>> accuracy(torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]]), torch.tensor([0, 0, -100]))
        50.0
    """
    hits = correctness(logits, labels).double()
    return 100.0 * float(hits.sum()) / len(hits) if len(hits) else math.nan


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true label, p_y.

    Args:
        logits: (B, K).
        labels: (B,), −100 marks padding.

    Returns:
        (N,) in 0…1; higher speaks for membership.
    """
    return sample_loss(logits, labels).neg().exp()


def sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, −log p_y in nats.

    Args:
        logits: (B, K).
        labels: (B,), −100 marks padding.

    Returns:
        (N,), ≥ 0; lower speaks for membership.
    """
    logits, labels = drop_padding(logits, labels)
    return -logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)


def entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Entropy of the prediction, H(p) = −Σ_k p_k log p_k with 0·log 0 = 0.

    Args:
        logits: (B, K).
        labels: (B,), used only to drop padding rows; without it every row counts.

    Returns:
        (N,) in 0…log K nats; lower speaks for membership.

    Example:
        >>> entropy(torch.zeros(1, 4))
        tensor([1.3863])
    """
    if labels is not None:
        logits, _ = drop_padding(logits, labels)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Modified entropy of Song and Mittal: −(1−p_y) log p_y − Σ_{k≠y} p_k log(1−p_k).

    Unlike the entropy it is small only where the prediction is sure *and right*. Logarithms are floored at log 1e-30.
    This is the definition of the paper; :func:`modified_entropy_as_published` is what several unlearning repositories
    compute under the same name.

    Args:
        logits: (B, K).
        labels: (B,), −100 marks padding.

    Returns:
        (N,), ≥ 0, in nats; lower speaks for membership.

    Source:
        Song, Mittal: *Systematic evaluation of privacy risks of machine learning models* (USENIX Security 2021), eq. 8.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
        >>> modified_entropy(logits, torch.tensor([0, 1]))
        tensor([6.5290e-04, 7.8918e+00])
    """
    logits, labels = drop_padding(logits, labels)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    floor = math.log(LOG_FLOOR)
    # log1p(−p) keeps small probabilities that 1 − p would round away
    terms = -p * torch.log1p(-p).clamp(min=floor)
    own = -(1 - p) * log_p.clamp(min=floor)
    is_label = torch.zeros_like(p, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return torch.where(is_label, own, terms).sum(dim=1)


def modified_entropy_as_published(logits: Tensor, labels: Tensor) -> Tensor:
    """What the code of SalUn, Unlearn-Sparse and SFRon computes as modified entropy; for comparison with their tables.

    Two slips make it another quantity than :func:`modified_entropy`: the label column is replaced in *every* row
    (``p[:, labels]`` instead of one element a row), and log p stands where log(1−p) belongs. The result is
    −Σ_{k∈Y} (1−p_k) log p_k − Σ_{k∉Y} p_k log p_k, where Y are the labels that occur anywhere in the given set: the
    value of a sample depends on which others are scored with it. Pass a whole set, never single batches.

    Args:
        logits: (B, K), all samples of one set.
        labels: (B,), −100 marks padding.

    Returns:
        (N,), ≥ 0.

    Source:
        ``m_entropy`` in OPTML-Group/Unlearn-Saliency and K1nght/Unified-Unlearning-w-Remain-Geometry.
    """
    logits, labels = drop_padding(logits, labels)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    # probabilities that underflow to 0 get log 1e-30 there, all others their own logarithm
    log_p = torch.where(p > 0, log_p, math.log(LOG_FLOOR))
    occurs = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    occurs[labels] = True
    return -(torch.where(occurs, 1 - p, p) * log_p).sum(dim=1)


def membership_feature(
    feature: Feature, logits: Tensor, labels: Tensor, *, m_entropy: ModifiedEntropy = "correct"
) -> Tensor:
    """One of the features that membership attacks use, by name.

    Args:
        feature: ``correctness``, ``confidence``, ``loss``, ``entropy``, ``m_entropy`` or ``probabilities``.
        logits: (B, K), all samples of one set.
        labels: (B,), −100 marks padding.
        m_entropy: which modified entropy ``m_entropy`` means: the paper's (``correct``) or the one of the SalUn family
            of repositories (``as_published``).

    Returns:
        (N,), or (N, K) for ``probabilities``.

    Raises:
        ValueError: a name is unknown or a shape is wrong.
    """
    check_choice(get_args(Feature), feature=feature)
    check_choice(get_args(ModifiedEntropy), m_entropy=m_entropy)
    if feature == "probabilities":
        return drop_padding(logits, labels)[0].softmax(dim=1)
    if feature == "m_entropy":
        return (modified_entropy if m_entropy == "correct" else modified_entropy_as_published)(logits, labels)
    scores = {"correctness": correctness, "confidence": confidence, "loss": sample_loss, "entropy": entropy}
    return scores[feature](logits, labels)
