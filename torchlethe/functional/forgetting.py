"""The maths of SFRon: adaptive forgetting coefficients, the saliency ratio, schedules.

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024,
https://arxiv.org/abs/2409.19732; official code https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forget_coefficients(losses: Tensor, lam: float = 0.5, floor: float = 0.0) -> Tensor:
    r"""Unnormalised adaptive coefficients :math:`c_i = 1 / (\max(\ell_i, \mathrm{floor})^\lambda + 10^{-15})`.

    Samples with a low loss, the well memorised ones, get a large coefficient; it falls as a sample is forgotten.

    Args:
        losses: per-sample losses :math:`\ell_i \ge 0`, shape ``(B,)``.
        lam: exponent :math:`\lambda` in [0, 1]; 0 gives uniform coefficients, that is plain gradient ascent.
        floor: lower bound on the losses inside the coefficient. In float32 cross-entropy is exactly 0 once the margin
            exceeds about 16.6; such a sample would take all the weight and has no gradient. 0 is the official code.

    Returns:
        Coefficients without gradient, shape ``(B,)``, dtype of ``losses``.

    Example:
        >>> forget_coefficients(torch.tensor([0.25, 4.0]), lam=0.5)
        tensor([2.0000, 0.5000])
    """
    return 1.0 / (losses.detach().clamp_min(floor).pow(lam) + 1e-15)


def adaptive_forget_loss(losses: Tensor, lam: float = 0.5, floor: float = 0.0) -> Tensor:
    r"""The weighted forgetting loss :math:`\sum_i w_i \ell_i` with :math:`w_i = c_i / \sum_j c_j` (detached).

    Args:
        losses: per-sample losses, shape ``(B,)``.
        lam: exponent of :func:`forget_coefficients`.
        floor: floor of :func:`forget_coefficients`.

    Returns:
        A scalar; ascend it to forget.

    Example:
        >>> adaptive_forget_loss(torch.tensor([0.25, 4.0]), lam=0.5)
        tensor(1.)
    """
    coefficients = forget_coefficients(losses, lam, floor)
    return (coefficients / coefficients.sum() * losses).sum()


def saliency_ratio(forget_fisher: Tensor, remain_fisher: Tensor, eps: float = 1e-15) -> Tensor:
    """How much more a weight matters to the forget set than to the remaining data, elementwise.

    Args:
        forget_fisher: diagonal Fisher information on the forget set, any shape, at least 0.
        remain_fisher: the same on the remaining data, same shape.
        eps: added to both, so that a weight that matters to neither has the ratio 1.

    Returns:
        The ratio, same shape.
    """
    return (forget_fisher + eps) / (remain_fisher + eps)


def forget_schedule(name: str, progress: float) -> float:
    """Factor on the forgetting strength after a fraction ``progress`` in [0, 1] of the run.

    Args:
        name: ``cosine`` (1 + cos πt) / 2, ``linear`` 1 - t, ``expdecay`` (1 - t)², or ``constant`` 1.
        progress: t = k / K.

    Returns:
        The factor.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> forget_schedule("cosine", 0.0), forget_schedule("linear", 0.25)
        (1.0, 0.75)
    """
    match name:
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "expdecay":
            return (1 - progress) ** 2
        case "constant":
            return 1.0
    raise ValueError(f"schedule is '{name}', allowed are cosine, linear, expdecay and constant.")


def weight_entropy(weights: Tensor) -> Tensor:
    """Entropy (nats) of normalised sample weights, shape ``(B,)``; log B when all samples push alike."""
    return torch.special.entr(weights).sum()
