"""The tensor operations of sharpness-aware minimisation, on lists of tensors, in place, without a host sync.

Symbols: g gradient of the batch at the weights w, m moving average of such gradients, d direction of the climb,
N its norm, ε the perturbation, g̃ the gradient of the same batch at w + ε. Lists hold one tensor a parameter, all in the
same order.

Sources: SAM (arXiv:2010.01412), ASAM (2102.11600), F-SAM (2403.12350, nblt/F-SAM), VaSSO (2309.15639), GSAM
(2203.08065), WSAM (2305.15817), LookSAM (2203.02714).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
Adaptive = Literal["w2", "eta"]


def total_norm(tensors: Tensors) -> Tensor:
    """Euclidean norm of all tensors together.

    Args:
        tensors: at least one; sharded ones (DTensor) count as a whole.

    Returns:
        Scalar tensor on the first tensor's device.
    """
    return norm_of_norms(torch._foreach_norm(list(tensors)))


def norm_of_norms(norms: Tensors) -> Tensor:
    """Euclidean norm of a whole from the norms of its parts, on the first part's device.

    Args:
        norms: scalar tensors, at least one.

    Example:
        >>> norm_of_norms([torch.tensor(3.0), torch.tensor(4.0)])
        tensor(5.)
    """
    device = norms[0].device
    # not get_total_norm: on a CPU its grouping and copying take as long as the norms of a small network
    here = [norm if norm.device == device else norm.to(device) for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(here))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def inner_product(left: Tensors, right: Tensors) -> Tensor:
    """Inner product of two lists of tensors, as a scalar tensor."""
    products = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in torch._foreach_mul(left, right)]
    return torch.cat([x.flatten() for x in products]).sum()


def adaptive_scale(params: Tensors, adaptive: Adaptive, eta: float, names: Sequence[str]) -> list[Tensor]:
    """ASAM's T, up to its sign: the climb is ε = ρ·T²⊙d / ‖T⊙d‖, in which the sign is gone.

    Args:
        params: w.
        adaptive: ``w2`` is T = w (davda54/sam); ``eta`` T = |w| + η for parameters with "weight" in their name and 1
            for others (SamsungLabs/ASAM).
        eta: η.
        names: of the parameters, for ``eta``.

    Returns:
        One tensor a parameter; for ``w2`` the parameters themselves.

    Example:
        >>> adaptive_scale([torch.tensor([-1.0, 2.0])], "eta", 0.5, ["net.weight"])
        [tensor([1.5000, 2.5000])]
    """
    if adaptive == "w2":
        return list(params)
    return [
        param.abs() + eta if "weight" in name else torch.ones_like(param)
        for param, name in zip(params, names, strict=True)
    ]


def friendly_direction_(grads: Tensors, ema: Tensors, sigma: float) -> None:
    """F-SAM's direction d = g − σ·m, in place of g, with the average from before this batch.

    Args:
        grads: g, becomes d.
        ema: m.
        sigma: share of the average that is removed; 0 gives SAM.
    """
    torch._foreach_add_(grads, ema, alpha=-sigma)


def friendly_average_(ema: Tensors, direction: Tensors, sigma: float, lmbda: float) -> None:
    """F-SAM's moving average m ← λ·m + (1 − λ)·g, written with d = g − σ·m as g is gone by then.

    λ·m + (1−λ)·(d + σ·m) = (λ + (1−λ)σ)·m + (1−λ)·d; for σ = 1 the first factor is 1.

    Args:
        ema: m, updated in place.
        direction: d.
        sigma: as in :func:`friendly_direction_`.
        lmbda: decay of the average, in [0, 1].
    """
    if (keep := lmbda + (1 - lmbda) * sigma) != 1:
        torch._foreach_mul_(ema, keep)
    torch._foreach_add_(ema, direction, alpha=1 - lmbda)


def sigma_of_paper_order(sigma: float, lmbda: float) -> float:
    """The σ with which the code's order (old average) gives the direction of the paper's order (new average).

    d' = g − σ·(λm + (1−λ)g) = (1 − σ(1−λ))·(g − σ'·m) with σ' = σλ / (1 − σ(1−λ)); the factor is lost in the
    normalisation. For σ = 1 both orders agree.

    Raises:
        ValueError: σ(1−λ) is 1 or more, where the direction would turn around.

    Example:
        >>> sigma_of_paper_order(1.0, 0.6)
        1.0
    """
    if sigma * (1 - lmbda) >= 1:
        raise ValueError(f"sigma is {sigma} with lmbda {lmbda}: order='paper' needs sigma * (1 - lmbda) below 1.")
    return 1.0 if sigma == 1 else sigma * lmbda / (1 - sigma * (1 - lmbda))


def gsam_combine_(first: Tensors, second: Tensors, alpha: float) -> None:
    """GSAM's update g̃ − α·g⊥ in place of g̃, where g⊥ is the part of g that is orthogonal to g̃.

    Args:
        first: g.
        second: g̃, becomes the update.
        alpha: α.
    """
    cosine = inner_product(first, second)
    first_norm, second_norm = total_norm(first), total_norm(second)
    cosine = cosine / (first_norm * second_norm + 1e-12)
    factor = 1 + alpha * cosine * first_norm / (second_norm + 1e-12)
    torch._foreach_mul_(second, factor)
    torch._foreach_add_(second, first, alpha=-alpha)


def wsam_combine_(first: Tensors, second: Tensors, gamma: float) -> None:
    """WSAM's coupled update g + γ/(1−γ)·(g̃ − g), in place of g̃.

    Args:
        first: g.
        second: g̃, becomes the update.
        gamma: γ in [0, 1); 0 is the base optimizer, 0.5 is SAM.
    """
    weight = gamma / (1 - gamma)
    torch._foreach_mul_(second, weight)
    torch._foreach_add_(second, first, alpha=1 - weight)


def orthogonal_component(first: Tensors, second: Tensors) -> list[Tensor]:
    """LookSAM's g_v = g̃ − (⟨g, g̃⟩/‖g‖²)·g, the part of g̃ that is orthogonal to g; zero gradients give g̃."""
    factor = inner_product(first, second) / total_norm(first).square().clamp_min(torch.finfo(first[0].dtype).tiny)
    component = torch._foreach_mul(first, -factor)
    torch._foreach_add_(component, second)
    return list(component)


def look_reuse_(grads: Tensors, component: Tensors, alpha: float) -> None:
    """LookSAM's step without a second pass, g + α·‖g‖/(‖g_v‖ + 1e-8)·g_v, in place of g.

    Args:
        grads: g.
        component: g_v of the last step with two passes.
        alpha: α.
    """
    factor = alpha * total_norm(grads) / (total_norm(component) + 1e-8)
    torch._foreach_add_(grads, torch._foreach_mul(component, factor))
