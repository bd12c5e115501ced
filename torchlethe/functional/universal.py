"""Universal adversarial perturbations: one image v for all inputs, what it minimises and where it may lie.

Feature gathering is FG-UAP (Ye, Cheng, Huang, "FG-UAP: Feature-Gathering Universal Adversarial Perturbation", 2022,
arXiv 2209.13113; github.com/yzx1213/FG-UAP). The other objectives are those of the methods that it is compared with;
each function names its source. Images x lie in [0, 1], v has the shape (1, C, H, W), φ is the feature in front of the
last linear layer, losses are scalars to be minimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Margin = Literal["bounded", "bounded_fixed_ref", "bounded_neg", "logit"]


def project(v: Tensor, xi: float, p: float = math.inf) -> Tensor:
    """Bring v back into the ball ‖v‖_p ≤ ξ.

    p = ∞ clamps every entry; otherwise v is scaled by ``min(1, ξ / (‖v‖_p + 1e-5))``, the norm over all entries, as in
    FG-UAP's code.

    Args:
        v: any shape.
        xi: radius in pixel units (images in [0, 1]).
        p: the norm, at least 1.

    Returns:
        A new tensor of the same shape.

    >>> project(torch.tensor([0.5, -0.125]), 0.25).tolist()
    [0.25, -0.125]
    """
    if math.isinf(p):
        bound = _at_most(xi, v.dtype)
        return v.clamp(-bound, bound)
    norm = torch.linalg.vector_norm(v, p)
    return v * (xi / (norm + 1e-5)).clamp(max=1.0)


@lru_cache(maxsize=64)
def _at_most(xi: float, dtype: torch.dtype) -> float:
    """The largest number of a precision that does not exceed ξ: 10/255 rounds up in float32."""
    rounded = torch.tensor(xi, dtype=dtype)
    return float(rounded if float(rounded) <= xi else torch.nextafter(rounded, torch.zeros_like(rounded)))


def perturbed(image: Tensor, v: Tensor, clamp: bool = True) -> Tensor:
    """X + v, in at least float32: bfloat16 is spaced by 1/256 between 0.5 and 1 and would lose most of v.

    Args:
        image: (B, C, H, W) floating point in [0, 1].
        v: (1, C, H, W) or (B, C, H, W).
        clamp: whether the result stays an image in [0, 1]. FG-UAP's code does not clamp.

    Returns:
        (B, C, H, W), float32 or float64.
    """
    if image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()
    moved = image + v
    return moved.clamp(0, 1) if clamp else moved


def feature_gathering_loss(features: Tensor, clean_features: Tensor) -> Tensor:
    """mean_i cos(φ(x_i + v), φ(x_i)): FG-UAP's objective, and Cos-UAP's when given logits (Zhang et al., 2021).

    Args:
        features: (B, d) of the perturbed images.
        clean_features: (B, d) of the clean ones, a constant.

    Returns:
        Scalar in [-1, 1], in at least float32. The gradient with respect to v vanishes at v = 0, where cos is maximal.
    """
    return F.cosine_similarity(at_least_float(features), at_least_float(clean_features), dim=1, eps=1e-8).mean()


def targeted_loss(logits: Tensor, target: int) -> Tensor:
    """Mean cross-entropy of the logits (B, K) with one class for all images, a scalar."""
    logits = at_least_float(logits)
    return F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))


def bounded_cross_entropy(logits: Tensor, labels: Tensor, bound: float = math.inf) -> Tensor:
    """mean_i min(CE(logits_i, y_i), β): the objective that SPGD climbs (Shafahi et al., 2020; kenny-co/sgd-uap-torch).

    Args:
        logits: (B, K).
        labels: (B,) int64.
        bound: β in nats, so that a few images that are lost already do not rule the mean; 12 for ImageNet.
    """
    return F.cross_entropy(at_least_float(logits), labels, reduction="none").clamp(max=bound).mean()


def margin_loss(logits: Tensor, labels: Tensor, kappa: float = 10.0, kind: Margin = "bounded_neg") -> Tensor:
    """The margin losses of DF-UAP (Zhang et al., CVPR 2020; phibenz/uap_virtual_data.pytorch).

    With l_t the logit of the given class and l_o the largest other: ``bounded`` mean max(l_o − l_t, −κ), targeted;
    ``bounded_fixed_ref`` the same with l_o held constant; ``bounded_neg`` mean max(l_t − l_o, −κ), untargeted;
    ``logit`` −mean max(l_t, 0), as their code has it (the maximum of a one-hot product).

    Args:
        logits: (B, K).
        labels: (B,) int64, the class to reach or to leave.
        kappa: κ ≥ 0, how far beyond the border the loss still falls.
        kind: which of the four.

    Returns:
        Scalar, in at least float32.
    """
    logits = at_least_float(logits)
    own = logits.gather(1, labels[:, None])[:, 0]
    if kind == "logit":
        return -own.clamp(min=0).mean()
    mask = F.one_hot(labels, logits.shape[1]).bool()
    other = logits.masked_fill(mask, -math.inf).amax(1)
    if kind == "bounded_neg":
        return (own - other).clamp(min=-kappa).mean()
    if kind == "bounded_fixed_ref":
        other = other.detach()
    elif kind != "bounded":
        raise ValueError(f"kind is {kind!r}, allowed are bounded, bounded_fixed_ref, bounded_neg and logit.")
    return (other - own).clamp(min=-kappa).mean()


def layer_saturation_loss(activations: Sequence[Tensor], kind: Literal["norm", "mean"] = "norm") -> Tensor:
    """−Σ_l log(½‖a_l‖²) over layers, when v alone is the input (GD-UAP, Mopuri et al., TPAMI 2018).

    ``mean`` is the older Fast Feature Fool (Mopuri et al., BMVC 2017): −Σ_l log(mean a_l) of the activations' positive
    parts.

    Args:
        activations: outputs of the layers, each (B, …).
        kind: ``norm`` for GD-UAP, ``mean`` for FFF.
    """
    if kind == "norm":
        return -torch.stack([(at_least_float(a).square().sum() / 2).log() for a in activations]).sum()
    return -torch.stack([(at_least_float(a).clamp(min=0).mean() + 1e-9).log() for a in activations]).sum()


def truncated_ratio_loss(activations: Sequence[Tensor], positive: int, negative: int, lam: float = 1.0) -> Tensor:
    """TRM-UAP's truncated ratio maximisation (Liu et al., ICCV 2023; RandolphCarter0/TRMUAP).

    λ Σ_{l < negative} log(½‖min(a_l, 0)‖₂ + 1e-9) − Σ_{l < positive} log(½‖max(a_l, 0)‖₂² + 1e-9): large positive
    and small negative activations in the first layers. As in their code the first norm is not squared.

    Args:
        activations: outputs of the convolutions in forward order.
        positive: how many of them count with their positive parts.
        negative: how many count with their negative parts.
        lam: λ, the weight of the negative parts.
    """
    activations = [at_least_float(a) for a in activations]
    rise = [(a.clamp(min=0).square().sum() / 2 + 1e-9).log() for a in activations[:positive]]
    fall = [(torch.linalg.vector_norm(a.clamp(max=0)) / 2 + 1e-9).log() for a in activations[:negative]]
    zero = activations[0].new_zeros(())
    return lam * sum(fall, zero) - sum(rise, zero)


def least_likely_entropy(logits: Tensor, clean_logits: Tensor, target: int | None = None) -> Tensor:
    """Mean cross-entropy with the least likely class of the clean prediction; GAP minimises its logarithm.

    Poursaeed, Katsman, Gao, Belongie, CVPR 2018.

    Args:
        logits: (B, K) of the perturbed images.
        clean_logits: (B, K) of the clean ones.
        target: a class for all images in place of the least likely ones.
    """
    classes = clean_logits.argmin(1) if target is None else torch.full_like(clean_logits[:, 0], target).long()
    return F.cross_entropy(at_least_float(logits), classes)


def kept_probability(logits: Tensor, clean_prediction: Tensor) -> Tensor:
    """q̄, the mean probability that the clean prediction (B,) keeps; NAG minimises −log(1 − q̄) (CVPR 2018)."""
    return at_least_float(logits).softmax(1).gather(1, clean_prediction[:, None]).mean()


def at_least_float(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it came in 16 bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def gaussian_images(count: int, shape: Sequence[int], generator: torch.Generator, std: float = 0.1) -> Tensor:
    """Proxy images without content: N(½, σ²) for every pixel, clamped to [0, 1].

    Args:
        count: how many.
        shape: (C, H, W).
        generator: on the CPU.
        std: σ.

    Returns:
        (count, C, H, W) float32.
    """
    return (torch.randn(count, *shape, generator=generator) * std + 0.5).clamp_(0, 1)


def jigsaw_images(
    count: int, shape: Sequence[int], generator: torch.Generator, sides: tuple[int, int] = (2, 8)
) -> Tensor:
    """Proxy images of random coloured squares, the "jigsaw" images of Cos-UAP and TRM-UAP.

    Each image is a grid of g × g patches of uniform random colour, g drawn for each image, enlarged to its size
    without interpolation.

    Args:
        count: how many.
        shape: (C, H, W).
        generator: on the CPU.
        sides: smallest and largest g.

    Returns:
        (count, C, H, W) float32 in [0, 1].
    """
    channels, height, width = shape
    low, high = sides
    drawn = torch.randint(low, high + 1, (count,), generator=generator)
    colours = torch.rand(count, channels, high, high, generator=generator)
    rows = torch.arange(height)[None] * drawn[:, None] // height
    columns = torch.arange(width)[None] * drawn[:, None] // width
    every = torch.arange(count)
    # advanced indices in front of a slice: (count, H, W, C)
    picked = colours.permute(0, 2, 3, 1)[every[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
