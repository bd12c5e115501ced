"""Losses that baselines of classification unlearning minimise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def negative_preference(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    r"""Negative preference optimisation :math:`\frac2\beta\,\overline{\log(1 + (p_\theta/p_{\theta_0})^\beta)}`.

    Its gradient is that of gradient ascent times :math:`2r^\beta/(1+r^\beta)` with :math:`r = p_\theta/p_{\theta_0}`,
    so it vanishes for samples that are forgotten; for :math:`\beta\to0` it is gradient ascent.

    Args:
        log_probs: :math:`\log p_\theta(y|x)` of the true labels, shape ``(B,)``.
        reference: the same of the original model, shape ``(B,)``, without gradient.
        beta: inverse temperature, above 0.

    Returns:
        A scalar; minimise it to forget.

    Source: Zhang et al., "Negative Preference Optimization", 2024, https://arxiv.org/abs/2404.05868, for image classes.

    Example:
        >>> value = torch.tensor([-1.0])
        >>> round(float(negative_preference(value, value, beta=2.0)), 4)  # log 2
        0.6931
    """
    return 2 / beta * F.softplus(beta * (log_probs - reference)).mean()


def l1_norm(weights: Iterable[Tensor]) -> Tensor:
    """Sum of the absolute values of all weights, a scalar with gradient.

    Args:
        weights: tensors of any shape, at least one.

    Example:
        >>> l1_norm([torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])])
        tensor(6.)
    """
    return torch.stack(list(torch._foreach_norm(list(weights), 1))).sum()


def l1_strength(alpha: float, epoch: int, epochs: int, no_l1_epochs: int = 0) -> float:
    r"""Weight of the L1 penalty in an epoch: :math:`a(1 - e/(E - E_0))` for :math:`e < E - E_0`, then 0.

    Args:
        alpha: weight a in the first epoch.
        epoch: the epoch e, from 0.
        epochs: number E of epochs.
        no_l1_epochs: number E₀ of epochs at the end without penalty.

    Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, as coded in
    https://github.com/OPTML-Group/Unlearn-Sparse.

    Example:
        >>> l1_strength(1.0, 0, 4), l1_strength(1.0, 1, 4), l1_strength(1.0, 2, 4, no_l1_epochs=2)
        (1.0, 0.75, 0.0)
    """
    penalised = epochs - no_l1_epochs
    return alpha * (1 - epoch / penalised) if epoch < penalised else 0.0


def lipschitz_ratio(logits: Tensor, noisy: Tensor, noise: Tensor) -> Tensor:
    r"""How much the output moves with the input, :math:`\overline{\|f(x) - f(x+\xi)\|_2 / \|\xi\|_2}`.

    Args:
        logits: f(x), shape ``(B, K)``.
        noisy: f(x + ξ), shape ``(B, K)``; detach it to move f(x) towards it.
        noise: ξ, shape ``(B, …)``, not zero.

    Returns:
        A scalar, the mean over samples.

    Source: Foster et al., "Zero-Shot Machine Unlearning at Scale via Lipschitz Regularization"
    (JiT), 2024, https://arxiv.org/abs/2402.01401.

    Example:
        >>> lipschitz_ratio(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([[2.0]]))
        tensor(2.5000)
    """
    moved = torch.linalg.vector_norm(logits - noisy, dim=1)
    return (moved / torch.linalg.vector_norm(noise.flatten(1), dim=1)).mean()


def soft_threshold(change: Tensor, threshold: Tensor | float) -> Tensor:
    r"""Shrink towards zero, :math:`\mathrm{sign}(\Delta)\max(|\Delta| - \tau, 0)`.

    Args:
        change: Δ, any shape.
        threshold: τ ≥ 0, a number or a scalar tensor.

    Returns:
        Same shape.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5]), 1.0)
        tensor([-2.,  0.])
    """
    return change.sign() * (change.abs() - threshold).clamp_min(0)
