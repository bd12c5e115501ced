"""Distances to teachers, and images across the nearest decision boundary."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence of a student from a teacher, :math:`\frac{T^2}{B} \sum_b \sum_k p_{t,k} \log(p_{t,k} / p_{s,k})`.

    Args:
        student: logits ``(B, K)``.
        teacher: logits ``(B, K)``.
        temperature: T, both logits are divided by it.

    Returns:
        A scalar, in nats; 0 where both agree. Source: Hinton et al. 2015, as SCRUB uses it (arXiv:2302.09880).

    Example:
        >>> distillation_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0)
        tensor(0.)
    """
    student_logs, teacher_logs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return F.kl_div(student_logs, teacher_logs, reduction="batchmean", log_target=True) * temperature**2


def bad_teacher_loss(
    student: Tensor,
    competent: Tensor,
    incompetent: Tensor,
    is_forget: Tensor,
    temperature: float = 1.0,
    mean: Literal["elements", "samples"] = "elements",
) -> Tensor:
    """Divergence from an incompetent teacher on forget samples and from a competent one on the others, without T².

    Source: Chundawat et al., AAAI 2023, https://arxiv.org/abs/2205.08096; code
    https://github.com/vikram2000b/bad-teaching-unlearning.

    Args:
        student: logits ``(B, K)``.
        competent: logits of the original network, ``(B, K)``.
        incompetent: logits of a network that knows nothing, ``(B, K)``.
        is_forget: ``(B,)`` bool, or 0 and 1.
        temperature: T, all logits are divided by it.
        mean: over samples *and* classes (``elements``), as in the official code; or over ``samples``, K times larger,
            the usual divergence, which NatMU's code (https://github.com/ZhengbaoHe/NatMU) has in this method.

    Returns:
        A scalar.
    """
    chosen = torch.where(is_forget.bool().unsqueeze(1), incompetent, competent)
    logs, target = F.log_softmax(student / temperature, 1), F.softmax(chosen / temperature, 1)
    losses = F.kl_div(logs, target, reduction="none")
    return losses.mean() if mean == "elements" else losses.sum(1).mean()


def boundary_images(image: Tensor, gradient: Tensor, epsilon: float = 0.1) -> Tensor:
    """One signed-gradient step in pixels, cut to [0, 1] and rounded to 8 bits, as Boundary Unlearning takes it.

    Source: Chen et al., CVPR 2023, https://arxiv.org/abs/2303.11570; code TY-LEE-KR/Boundary-Unlearning-Code.

    Args:
        image: ``(B, C, H, W)`` in [0, 1].
        gradient: of each sample's loss by its pixels, same shape.
        epsilon: size of the step.

    Returns:
        Images of the same shape.
    """
    return ((image + epsilon * gradient.sign()).clamp(0, 1) * 255).round() / 255
