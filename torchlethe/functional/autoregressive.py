"""Autoregressive perturbations: each pixel is a fixed linear function of its neighbours above and to the left.

Symbols: b (3, 3) kernel of a class and channel with b[2, 2] = 0; s the pattern,
s[i, j] = Σ_{u,v} b[u, v]·s[i − 2 + u, j − 2 + v] for i, j ≥ 2 in raster order.

Source: Sandoval-Segura et al., NeurIPS 2022, psandovalsegura/autoregressive-poisoning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ORDER = 2  # rows and columns that a pixel looks back


def autoregressive_pattern(kernels: Tensor, label: Tensor, start: Tensor) -> Tensor:
    """Run the recursion for all images at once.

    Within a row it is a linear filter of what the two rows above contribute: one product with the lower triangular
    matrix of its impulse response for each row, in place of one operation for each pixel.

    Args:
        kernels: (K, C, 3, 3) b, best in float64.
        label: (B,) int64, which kernels each image follows.
        start: (B, C, H, W); only its first two rows and columns matter.

    Returns:
        (B, C, H, W) s, of the kernels' dtype.

    >>> kernels = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 2, 0]]).view(1, 1, 3, 3)
    >>> autoregressive_pattern(kernels, torch.tensor([0]), torch.ones(1, 1, 3, 5))[0, 0, 2]
    tensor([1., 1., 2., 4., 8.])
    """
    length = start.shape[-1] - ORDER
    b = kernels[label]
    response = _row_response(kernels[:, :, ORDER, 1], kernels[:, :, ORDER, 0], length)[label]
    start = start.to(kernels.dtype)
    rows = list(start[:, :, :ORDER].unbind(2))
    for i in range(ORDER, start.shape[2]):
        left = start[:, :, i, :ORDER]
        above = torch.zeros_like(start[:, :, i, ORDER:])
        for u, row in enumerate(rows[-ORDER:]):
            for v in range(ORDER + 1):
                above += b[:, :, u, v, None] * row[:, :, v : v + length]
        # what the two given pixels at the left contribute to the first two of the row
        above[:, :, 0] += b[:, :, ORDER, 0] * left[:, :, 0] + b[:, :, ORDER, 1] * left[:, :, 1]
        if length > 1:
            above[:, :, 1] += b[:, :, ORDER, 0] * left[:, :, 1]
        rows.append(torch.cat([left, (response @ above[..., None])[..., 0]], 2))
    return torch.stack(rows, 2)


def _row_response(one: Tensor, two: Tensor, length: int) -> Tensor:
    """(K, C, W, W): the lower triangular matrix T with u = T·c for u_j = c_j + one·u_{j−1} + two·u_{j−2}."""
    impulse = [torch.ones_like(one), one]
    while len(impulse) < length:
        impulse.append(one * impulse[-1] + two * impulse[-2])
    lag = torch.arange(length, device=one.device)[:, None] - torch.arange(length, device=one.device)
    return torch.stack(impulse[:length], -1)[..., lag.clamp_min(0)] * (lag >= 0)


def l2_scaled(pattern: Tensor, norm: float, crop: int = 0) -> tuple[Tensor, Tensor]:
    """Leave out the first rows and columns, and scale each image's pattern to a Euclidean norm.

    Args:
        pattern: (B, C, H, W).
        norm: the norm of the result.
        crop: rows at the top and columns at the left that are left out.

    Returns:
        The scaled patterns (B, C, H − crop, W − crop), and their norms (B,) before.
    """
    pattern = pattern[..., crop:, crop:]
    length = torch.linalg.vector_norm(pattern.flatten(1), dim=1)
    return pattern * (norm / length.clamp_min(torch.finfo(length.dtype).tiny))[:, None, None, None], length


def filter_response(kernels: Tensor, delta: Tensor) -> Tensor:
    """How strongly the filters of classes answer to patterns; the filter of a pattern's own class answers with 0.

    Args:
        kernels: (K, C, 3, 3) b; the filter is b with −1 in the corner, summed over channels.
        delta: (B, C, H, W) patterns.

    Returns:
        (B, K) sum of the positive part of the filtered pattern.
    """
    filters = kernels.clone()
    filters[..., ORDER, ORDER] = -1
    return F.conv2d(delta, filters).relu().sum((2, 3))


def draw_kernels(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random kernels whose entries sum to 1: normal numbers, 0 in the corner, divided by their sum.

    Args:
        count: K.
        channels: C.
        generator: on the CPU.

    Returns:
        (K, C, 3, 3) float64.
    """
    kernels = torch.randn(count, channels, 3, 3, dtype=torch.float64, generator=generator)
    kernels[..., ORDER, ORDER] = 0
    return kernels / kernels.sum((2, 3), keepdim=True)


def find_kernels(
    classes: int,
    channels: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    crop: int = 4,
    max_norm: float = 50.0,
    min_response: float = 10.0,
    trials: int = 3,
    candidates: int | None = None,
) -> Tensor:
    """Draw kernels until each class has one that neither explodes nor resembles another's.

    A kernel is accepted if the norms of its trial patterns are finite and at most ``max_norm``, and the filters of all
    classes accepted before respond with at least ``min_response`` to a pattern of it that is scaled to norm 1.

    Args:
        classes: K.
        channels: C.
        size: height and width of the images.
        generator: on the CPU.
        crop: see :func:`l2_scaled`.
        max_norm: largest norm of a trial pattern.
        min_response: smallest response, see :func:`filter_response`.
        trials: patterns that are tried for each kernel.
        candidates: kernels that are drawn at most, counted as C channels each; 2000 for each class by default.

    Returns:
        (K, C, 3, 3) float64.

    Raises:
        ValueError: too few of the candidates were accepted.
    """
    found = torch.zeros(0, channels, 3, 3, dtype=torch.float64)
    shape = (size[0] + crop, size[1] + crop)
    candidates = 2000 * classes if candidates is None else candidates
    # A pattern's norm is at most max_norm only if each channel's is, so channels are tried alone first; whole kernels
    # are then made of those that passed, with the trials that they passed.
    pool, tried = torch.zeros(0, 3, 3, dtype=torch.float64), torch.zeros(0, trials, *size, dtype=torch.float64)
    batch = 1000
    for _ in range(-(-candidates * channels // batch)):
        drawn = draw_kernels(batch, 1, generator)
        patterns = torch.zeros(batch, trials, *size, dtype=torch.float64)
        alive = torch.arange(batch)
        for trial in range(trials):
            start = torch.randn(len(alive), 1, *shape, dtype=torch.float64, generator=generator)
            pattern = autoregressive_pattern(drawn, alive, start)[:, 0, crop:, crop:]
            norm = torch.linalg.vector_norm(pattern, dim=(1, 2))
            kept = norm.isfinite() & (norm <= max_norm)
            alive = alive[kept]
            patterns[alive, trial] = pattern[kept]
        pool, tried = torch.cat([pool, drawn[alive, 0]]), torch.cat([tried, patterns[alive]])
        while len(pool) >= channels:
            kernel, pattern = pool[:channels], tried[:channels].transpose(0, 1)
            pool, tried = pool[channels:], tried[channels:]
            scaled, norms = l2_scaled(pattern, 1.0)
            other = filter_response(found, scaled[:1]) if len(found) else torch.full((1, 1), torch.inf)
            if bool((norms <= max_norm).all() & (other >= min_response).all()):
                found = torch.cat([found, kernel[None]])
            if len(found) == classes:
                return found
    raise ValueError(
        f"min_response is {min_response}, with which only {len(found)} of {classes} classes found a kernel among "
        f"{candidates} for images of {size[0]}×{size[1]} pixels: lower it (responses grow with the images' width)."
    )
