"""How far a model's outputs lie from a reference model's, usually from Retrain's on the forget set.

Two sheets of published numbers differ only by a mean over classes or a direction, so each function says in formulas
what it averages. Computed in the dtype of the logits; pass float64 for comparisons. Rows whose optional label is −100
(padding of a distributed sampler) are dropped. p_u are the probabilities of the judged model, p_r the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchlethe.functional.uncertainty import PADDING_LABEL


def paired_logits(logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Check that two models' logits belong to the same samples and drop padding rows.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference, same order.
        labels: (B,), only to find padding (−100).

    Returns:
        Both, (N, K).

    Raises:
        ValueError: the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits and reference_logits must have the same shape (samples, classes), got {tuple(logits.shape)} and "
            f"{tuple(reference_logits.shape)}."
        )
    if labels is None:
        return logits, reference_logits
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape ({logits.shape[0]},), got {tuple(labels.shape)}.")
    real = labels != PADDING_LABEL
    return logits[real], reference_logits[real]


def kl_to_reference(
    logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None, *, eps: float = 1e-20
) -> Tensor:
    """KL(p_r ‖ p_u) = Σ_k p_r,k (log(p_r,k + eps) − log(p_u,k + eps)) of each sample.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference.
        labels: (B,), only to drop padding.
        eps: added inside the logarithms; it bounds the value by −log eps.

    Returns:
        (N,) nats, ≥ 0 up to rounding; lower is closer. The published number is the mean over the forget set.

    Source:
        ``K1nght/Unified-Unlearning-w-Remain-Geometry``, KL of Retrain to the unlearned model.

    Example:
        >>> a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> kl_to_reference(b, a)
        tensor([0.1201])
    """
    logits, reference_logits = paired_logits(logits, reference_logits, labels)
    p_u, p_r = logits.softmax(dim=1), reference_logits.softmax(dim=1)
    return (p_r * (_log(p_r, eps) - _log(p_u, eps))).sum(dim=1)


def js_to_reference(
    logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None, *, eps: float = 1e-20
) -> Tensor:
    """Jensen–Shannon divergence ½ KL(p_u ‖ m) + ½ KL(p_r ‖ m), m = ½ (p_u + p_r), of each sample.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference.
        labels: (B,), only to drop padding.
        eps: added inside the logarithms.

    Returns:
        (N,) nats in 0…log 2 (natural logarithm, summed over classes); symmetric; lower is closer.
    """
    logits, reference_logits = paired_logits(logits, reference_logits, labels)
    p_u, p_r = logits.softmax(dim=1), reference_logits.softmax(dim=1)
    log_m = _log(0.5 * (p_u + p_r), eps)
    return 0.5 * (p_u * (_log(p_u, eps) - log_m) + p_r * (_log(p_r, eps) - log_m)).sum(dim=1)


def js_bad_teacher(logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """The “JS divergence” of the bad-teacher code, of each sample.

    JS' = ½ mean_k [m (log m − log p_u) + m (log m − log p_r)], m = ½ (p_u + p_r). It averages over the K classes where
    :func:`js_to_reference` sums, and measures KL from the mixture m instead of to it, so it is about K times smaller.
    It is what ZRF is made of.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference.
        labels: (B,), only to drop padding.

    Returns:
        (N,), ≥ 0; lower is closer.

    Source:
        ``JSDiv`` in vikram2000b/bad-teaching-unlearning (``F.kl_div`` with its default reduction).
    """
    logits, reference_logits = paired_logits(logits, reference_logits, labels)
    log_u, log_r = logits.log_softmax(dim=1), reference_logits.log_softmax(dim=1)
    m = 0.5 * (log_u.exp() + log_r.exp())
    return 0.5 * (2 * torch.xlogy(m, m) - m * log_u - m * log_r).mean(dim=1)


def zero_retrain_forgetting(logits: Tensor, random_logits: Tensor, labels: Tensor | None = None) -> float:
    """ZRF = 1 − mean over samples of :func:`js_bad_teacher` against a *randomly initialised* network.

    Args:
        logits: (B, K) of the judged model on the forget set.
        random_logits: (B, K) of a network of the same architecture with random weights.
        labels: (B,), only to drop padding.

    Returns:
        At most 1; 1 means the model behaves on the forget set like one that has never been trained. More is not
        better: a retrained model generalises to forget samples and lies below 1, so compare with Retrain.

    Source:
        Chundawat et al., *Can bad teaching induce forgetting?* (AAAI 2023), eq. 3, as coded.
    """
    return 1.0 - float(js_bad_teacher(logits, random_logits, labels).mean())


def activation_distance(logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Euclidean distance ‖p_u − p_r‖₂ of the two probability vectors of each sample.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference.
        labels: (B,), only to drop padding.

    Returns:
        (N,) in 0…√2; lower is closer. The published number is the mean over the forget set.
    """
    logits, reference_logits = paired_logits(logits, reference_logits, labels)
    return (logits.softmax(dim=1) - reference_logits.softmax(dim=1)).norm(dim=1)


def completeness(logits: Tensor, reference_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Whether both models predict the same class, for each sample.

    Args:
        logits: (B, K) of the judged model.
        reference_logits: (B, K) of the reference.
        labels: (B,), only to drop padding.

    Returns:
        (N,) booleans; completeness in percent is 100 times their mean; higher is closer.
    """
    logits, reference_logits = paired_logits(logits, reference_logits, labels)
    return logits.argmax(dim=1) == reference_logits.argmax(dim=1)


def wasserstein1(values: Tensor, reference_values: Tensor) -> float:
    """Wasserstein-1 distance between two sets of real numbers, e.g. two models' confidences on the forget set.

    ∫ |F(t) − G(t)| dt with the empirical distribution functions F and G; for equal sizes the mean absolute difference
    of the sorted values. It compares distributions, not samples: pairs need not correspond.

    Args:
        values: (N,) real numbers, N ≥ 1.
        reference_values: (M,) real numbers, M ≥ 1; N and M may differ.

    Returns:
        ≥ 0, in the unit of the values; lower is closer.

    Raises:
        ValueError: a tensor is empty or not one-dimensional.

    Example:
        >>> wasserstein1(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        2.0
    """
    if values.ndim != 1 or reference_values.ndim != 1 or not len(values) or not len(reference_values):
        raise ValueError(
            f"wasserstein1 needs two non-empty one-dimensional tensors, got shapes {tuple(values.shape)} and "
            f"{tuple(reference_values.shape)}."
        )
    a, b = values.double().sort().values, reference_values.double().sort().values
    if len(a) == len(b):
        return float((a - b).abs().mean())
    grid = torch.cat([a, b]).sort().values
    below_a = torch.searchsorted(a, grid[:-1], right=True).double() / len(a)
    below_b = torch.searchsorted(b, grid[:-1], right=True).double() / len(b)
    return float(((below_a - below_b).abs() * grid.diff()).sum())


def parameter_distance(
    parameters: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Distance ‖θ_u − θ_r‖₂ of each tensor of two models, and the same divided by ‖θ_u‖₂.

    Args:
        parameters: the judged model's tensors by name, e.g. ``dict(model.named_parameters())``.
        reference: the reference's tensors, same names and shapes.

    Returns:
        For each name the absolute and the relative distance; the relative one is NaN for a tensor of zeros.

    Raises:
        ValueError: the names or shapes differ.

    Example:
        >>> parameter_distance({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)})
        {'w': (5.0, 1.0)}
    """
    if parameters.keys() != reference.keys():
        raise ValueError(f"the two models differ in the tensors {sorted(parameters.keys() ^ reference.keys())}.")
    distances = {}
    for name, value in parameters.items():
        if value.shape != reference[name].shape:
            raise ValueError(f"tensor {name!r} has the shapes {tuple(value.shape)} and {tuple(reference[name].shape)}.")
        own = value.detach().double()
        gap = float((own - reference[name].detach().double().to(own.device)).norm())
        norm = float(own.norm())
        distances[name] = (gap, gap / norm if norm else float("nan"))
    return distances


def total_distance(parameters: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, float]:
    """Distance ‖θ_u − θ_r‖₂ of all tensors of two models together, and the same divided by ‖θ_u‖₂.

    Two networks that differ by their seed alone are far apart, so compare with the distance of another Retrain.

    Args:
        parameters: the judged model's tensors by name.
        reference: the reference's, same names and shapes.

    Returns:
        The absolute and the relative distance; the relative one is NaN for a model of zeros.

    Raises:
        ValueError: the names or shapes differ.

    Example:
        >>> ours = {"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> total_distance(ours, {"w": torch.zeros(1), "b": torch.zeros(1)})
        (5.0, 1.0)
    """
    gap = math.hypot(*(layer[0] for layer in parameter_distance(parameters, reference).values()))
    norm = math.hypot(*(float(value.detach().double().norm()) for value in parameters.values()))
    return gap, gap / norm if norm else math.nan


def _log(p: Tensor, eps: float) -> Tensor:
    # eps vanishes beside p in float32 unless p is 0, where it keeps log finite: the published form
    return (p + eps).log()
