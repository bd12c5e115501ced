"""SCAR's maths: class statistics of features, a distance to a class, and what is kept on surrogate images.

Source: the official code, https://github.com/jbonato1/SCAR (Bonato et al.).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tukey(features: Tensor, power: float = 0.5) -> Tensor:
    """Tukey's ladder of powers, sign(x)·|x|^λ, which makes skewed features more like a normal distribution.

    The sign carries it over to features that may be negative (those of transformers); for others it is x^λ. The
    gradient at exactly 0, where that of a root is infinite, is 0.

    Args:
        features: any shape.
        power: λ, above 0.

    Returns:
        The same shape.

    Example:
        >>> tukey(torch.tensor([4.0, 0.0, -9.0]))
        tensor([ 2.,  0., -3.])
    """
    zero = features == 0
    size = torch.where(zero, torch.ones_like(features), features).abs().pow(power)
    return torch.where(zero, torch.zeros_like(features), features.sign() * size)


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The number of samples and the sum of features of each class.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` in [0, K).
        num_classes: K.

    Returns:
        Counts ``(K,)`` and sums ``(K, D)``, both in the features' dtype; sums over ranks may be taken of them.
    """
    counts = torch.bincount(labels, minlength=num_classes).to(features.dtype)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return counts, sums


def class_scatter(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    r"""The scatter matrix of each class, :math:`\sum_{i: y_i = k} (x_i - \mu_k)(x_i - \mu_k)^T`.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` in [0, K).
        means: μ, ``(K, D)``.

    Returns:
        ``(K, D, D)``; divided by the number of samples less one it is the covariance.
    """
    order = labels.argsort()
    centred = (features - means[labels])[order]
    parts = centred.split(torch.bincount(labels, minlength=len(means)).tolist())
    return torch.stack([part.mT @ part for part in parts])


def shrunk_covariance(covariance: Tensor, gamma1: float = 3.0, gamma2: float = 3.0) -> Tensor:
    """One shrinkage: Σ + γ₁·mean(diagonal)·I + γ₂·mean(off-diagonal)·(1 − I).

    Args:
        covariance: Σ, ``(..., D, D)``.
        gamma1: weight of the mean variance.
        gamma2: weight of the mean covariance.

    Returns:
        The same shape.

    Example:
        >>> shrunk_covariance(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        tensor([[7., 8.],
                [8., 9.]])
    """
    size = covariance.shape[-1]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    others = (covariance.sum((-2, -1)) - diagonal) / max(size * (size - 1), 1)
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    first, second = gamma1 * diagonal / size, gamma2 * others
    return covariance + first[..., None, None] * eye + second[..., None, None] * (1 - eye)


def correlation(covariance: Tensor) -> Tensor:
    """A covariance with its variances scaled to 1, Σ_ij / √(Σ_ii Σ_jj).

    Args:
        covariance: ``(..., D, D)``; a variance of 0 leaves its row and column as they are.

    Returns:
        The same shape.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
    return covariance * scale[..., :, None] * scale[..., None, :]


def inverse_correlation(covariance: Tensor, gamma1: float = 3.0, gamma2: float = 3.0) -> Tensor:
    """Σ⁻¹ as SCAR takes it: shrink twice, normalise to a correlation, then the pseudo-inverse.

    Args:
        covariance: ``(..., D, D)``, symmetric.
        gamma1: see :func:`shrunk_covariance`.
        gamma2: likewise.

    Returns:
        The same shape.
    """
    for _ in range(2):
        covariance = shrunk_covariance(covariance, gamma1, gamma2)
    return torch.linalg.pinv(correlation(covariance), hermitian=True)


def mahalanobis_form(features: Tensor, means: Tensor, inverses: Tensor) -> Tensor:
    """dᵀ Σ_k⁻¹ d of each sample and class, where d = x / ‖x‖ − μ_k / ‖μ_k‖.

    Args:
        features: transformed features x, ``(B, D)``.
        means: μ, ``(K, D)``.
        inverses: Σ⁻¹, ``(K, D, D)``.

    Returns:
        ``(B, K)``.
    """
    apart = F.normalize(features, dim=1).unsqueeze(0) - F.normalize(means, dim=1).unsqueeze(1)
    return (torch.bmm(apart, inverses) * apart).sum(2).mT


def nearest_other_class(distances: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The closest class that is not a sample's own.

    Args:
        distances: ``(B, K)``.
        labels: ``(B,)`` in [0, K).
        known: ``(K,)`` bool, the classes with statistics.

    Returns:
        ``(B,)`` class numbers; some known class must differ from each label.
    """
    own = F.one_hot(labels, len(known)).bool()
    return distances.masked_fill(own | ~known, float("inf")).argmin(1)


def surrogate_divergence(
    student: Tensor, teacher: Tensor, gone: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """KL divergence of a network from the original on surrogate images, as if that had never known some classes.

    The original's logits of these classes are set to the smallest of their row, and images that it takes for one of
    them do not count.

    Args:
        student: logits ``(B, K)``.
        teacher: the original's logits ``(B, K)``.
        gone: ``(K,)`` bool, classes that are forgotten as a whole.
        temperature: T, both logits are divided by it, and the divergence is multiplied by T².

    Returns:
        The divergence of each image in nats, 0 where it does not count, ``(B,)``; and whether it counts, ``(B,)`` bool.
    """
    counts = ~gone[teacher.argmax(1)]
    teacher = torch.where(gone, teacher.amin(1, keepdim=True), teacher)
    student_logs, teacher_logs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    losses = F.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum(1) * temperature**2
    return losses * counts, counts
