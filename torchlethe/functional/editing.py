"""The maths of one-shot weight editing: dampening, influence functions, Fisher noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dampening_factor(forget: Tensor, full: Tensor, alpha: float, lam: float = 1.0) -> Tensor:
    r"""Selective synaptic dampening: :math:`\min(\lambda\, i_D / i_f, 1)` where :math:`i_f > \alpha\, i_D`, else 1.

    Source: Foster et al., AAAI 2024, https://arxiv.org/abs/2308.07707; official code
    https://github.com/if-loops/selective-synaptic-dampening.

    Args:
        forget: importance :math:`i_f` of each weight to the forget set, at least 0.
        full: importance :math:`i_D` to the whole training set, same shape.
        alpha: how much more important to the forget set a weight must be to be dampened.
        lam: strength :math:`\lambda`; a weight is never enlarged.

    Returns:
        The factor for each weight, in [0, 1].

    Example:
        >>> dampening_factor(torch.tensor([9.0, 1.0]), torch.tensor([3.0, 1.0]), alpha=2.0)
        tensor([0.3333, 1.0000])
    """
    ratio = (lam * full / forget).clamp(max=1.0)
    return torch.where(forget > alpha * full, ratio, torch.ones_like(ratio))


def adaptive_level(forget_size: int, size: int) -> float:
    """The percentile at which the adaptive variant (ASSD) puts its threshold: 100 - ln(1 + 100 · N_f / N).

    Args:
        forget_size: samples of the forget set.
        size: samples of the whole training set.

    Example:
        >>> round(adaptive_level(10, 100), 3)
        97.602
    """
    return 100 - math.log(1 + 100 * forget_size / size)


def finite_percentile(values: Tensor, level: float) -> Tensor:
    """The percentile of the finite entries with linear interpolation, for tensors of any size.

    Args:
        values: any shape; infinite entries and NaN are left out.
        level: in [0, 100].

    Returns:
        A scalar tensor; NaN when no entry is finite.

    Example:
        >>> finite_percentile(torch.tensor([1.0, 2.0, 3.0, float("inf")]), 75.0)
        tensor(2.5000)
    """
    ordered = values[torch.isfinite(values)].sort().values  # torch.quantile takes no more than 2^24 entries
    if not len(ordered):
        return values.new_full((), math.nan)
    place = level / 100 * (len(ordered) - 1)
    low = math.floor(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def woodfisher_multiple(along_first: Tensor, along_target: Tensor, n0: float = 1000.0) -> float:
    r"""What the published "WoodFisher" recursion adds to its target: this multiple of the first sample's gradient.

    With sample gradients :math:`g_0, g_1, \dots` the recursion starts at :math:`o = g_0`, :math:`k = v` and repeats
    :math:`a = o \cdot g_n`, :math:`k \leftarrow k - \frac{k \cdot g_n}{N_0 + a}\, o`,
    :math:`o \leftarrow o - \frac{a}{N_0 + a}\, o`. As o never leaves the line of :math:`g_0`, the result is v plus a
    multiple of :math:`g_0`, and inner products are all it needs. Official code: OPTML-Group/Unlearn-Saliency.

    Args:
        along_first: :math:`g_0 \cdot g_n` for n = 0, 1, …, shape ``(N,)``; the entry of n = 0 is not used.
        along_target: :math:`v \cdot g_n`, shape ``(N,)``.
        n0: the constant :math:`N_0`.

    Returns:
        s with k = v + s · g_0.
    """
    multiple, scale = 0.0, 1.0
    for d, e in zip(along_first.tolist()[1:], along_target.tolist()[1:], strict=True):
        a = scale * d
        multiple -= (e + multiple * d) / (n0 + a) * scale
        scale -= a / (n0 + a) * scale
    return multiple


def fisher_noise_variance(squares: Tensor, alpha: float, head: bool = False) -> Tensor:
    r"""Variance of the noise of Fisher forgetting, before rows are averaged: :math:`\alpha \min(1/(h + 10^{-8}), c)`.

    The bound c is 1e3, for the head 1e2. Weights with more than one dimension share the mean over dimension 1; the
    head's variance and that of one-dimensional weights is multiplied by 10. Source: Golatkar et al., CVPR 2020
    (https://arxiv.org/abs/1911.04933) as coded in OPTML-Group/Unlearn-Saliency (``fisher_new``).

    Args:
        squares: h, the expected squared gradients of one parameter.
        alpha: strength.
        head: whether the parameter belongs to the last layer.

    Returns:
        The variance of each weight, same shape.
    """
    variance = alpha * (1 / (squares + 1e-8)).clamp(max=1e2 if head else 1e3)
    if variance.ndim > 1:
        variance = variance.mean(1, keepdim=True).expand_as(variance).clone()
    return variance * 10 if head or variance.ndim == 1 else variance


def empirical_noise_scale(fisher: Tensor, alpha: float, head: bool = False) -> Tensor:
    """Standard deviation of the noise of the older Fisher forgetting: √(α / f), at most 1e-3, times 10 for the head.

    Args:
        fisher: f, the per-sample empirical Fisher information of one parameter.
        alpha: strength.
        head: whether the parameter belongs to the last layer.
    """
    scale = (alpha / fisher).sqrt().clamp(max=1e-3)
    return scale * 10 if head else scale
