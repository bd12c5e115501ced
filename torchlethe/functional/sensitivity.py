r"""The maths of MU-Mis: input sensitivities of single logits, the loss on them, its step size and its stop rule.

Source: Cheng et al., "Remaining-data-free Machine Unlearning by Suppressing Sample Contribution", ICLR 2026,
https://arxiv.org/abs/2402.15109. Notation: :math:`f(x; w) \in R^C` are the logits, c is the label of x, and c' another
("irrelevant") class. The sensitivity of logit k is the 2-norm :math:`\|\nabla_x f_k(x)\|` over all entries of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchlethe.functional.mean_loss import differentiable_twice


def input_gradient(
    logits: Tensor, image: Tensor, classes: Tensor, *, create_graph: bool = False, retain_graph: bool = True
) -> Tensor:
    r"""The gradient :math:`\nabla_{x_i} f_{k_i}(x_i)` of one logit of each sample, by one backward pass for the batch.

    The sum of the chosen logits is differentiated, which gives the gradients of the single samples as long as samples
    do not interact: BatchNorm in eval mode, LayerNorm, GroupNorm, attention within a sample; not BatchNorm in train
    mode.

    Args:
        logits: (B, C), computed from ``image``.
        image: (B, …) that requires a gradient.
        classes: (B,) the logit k of each sample, in 0…C-1.
        create_graph: whether the result can be differentiated again.
        retain_graph: whether another gradient of the same logits follows.

    Returns:
        (B, …), in the shape of ``image``.

    Example:
        >>> image = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> input_gradient(image @ torch.tensor([[1.0, 0.0], [0.0, 3.0]]), image, torch.tensor([1]))
        tensor([[0., 3.]])
    """
    chosen = logits.gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(chosen, image, create_graph=create_graph, retain_graph=retain_graph)
    return gradient


def squared_norms(gradient: Tensor) -> Tensor:
    """(B,) squared 2-norms of the rows of ``gradient`` (B, …)."""
    return gradient.flatten(1).square().sum(1)


def input_sensitivity(network: nn.Module, image: Tensor, classes: Tensor) -> Tensor:
    r"""The sensitivities :math:`\|\nabla_{x_i} f_k(x_i)\|` of chosen logits, one forward and K backward passes.

    The network is used in eval mode and without autocast; its modes, parameters, gradients and buffers stay as they
    are. Works inside inference mode.

    Args:
        network: maps images to logits (B, C).
        image: (B, …) floating.
        classes: (B, K), or (B,) for one logit a sample, in 0…C-1.

    Returns:
        The norms, in the shape of ``classes``, at least 0.

    Example:
        >>> input_sensitivity(nn.Linear(2, 3), torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([4])
    """
    with differentiable_twice(network):
        # tensors that were made in inference mode cannot be saved for a backward pass, copies can
        leaf = image.detach().clone().requires_grad_()
        columns = classes.clone().view(len(image), -1).unbind(1)
        logits = network(leaf)
        last = len(columns) - 1
        norms = [
            squared_norms(input_gradient(logits, leaf, column, retain_graph=number < last)).sqrt()
            for number, column in enumerate(columns)
        ]
        return torch.stack(norms, dim=1).view(classes.shape)


def irrelevant_class(label: Tensor, bits: Tensor, num_classes: int) -> Tensor:
    """A class other than the label, uniform over the others when ``bits`` are uniform.

    Args:
        label: (B,) or (B, 1) labels in 0…C-1.
        bits: non-negative random integers, of a shape that broadcasts with ``label``.
        num_classes: C, at least 2; with 2 the answer is always the other class.

    Returns:
        Classes in 0…C-1, never the label.

    Example:
        >>> irrelevant_class(torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1]), num_classes=3)
        tensor([1, 0, 1])
    """
    return (label + 1 + bits % (num_classes - 1)) % num_classes


def sensitivity_gap(
    target: Tensor, irrelevant: Tensor, weights: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> Tensor:
    r"""The terms of the loss, :math:`\alpha_c\|\nabla_x f_c\|^2 - \sum_{c'} \alpha_{c'}\|\nabla_x f_{c'}\|^2` (eq. 3).

    Args:
        target: (B,) squared sensitivities of the true logit.
        irrelevant: (B, K) squared sensitivities of K other logits; the paper has K = 1. They are summed after squaring.
        weights: :math:`\alpha_c` (B,) and :math:`\alpha_{c'}` (B, K); all 1 by default.

    Returns:
        (B,); its mean is the loss. Without weights it has no lower bound.

    Example:
        >>> sensitivity_gap(torch.tensor([4.0]), torch.tensor([[1.0]]))
        tensor([3.])
    """
    if weights[0] is not None and weights[1] is not None:
        target, irrelevant = weights[0] * target, weights[1] * irrelevant
    return target - irrelevant.sum(1)


def hinge_weights(
    target: Tensor, irrelevant: Tensor, target_goal: Tensor, irrelevant_goal: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Indicator weights that bound the loss below: a term counts until it has reached its goal.

    :math:`\alpha_c = 1[\|\nabla f_c\| > \kappa\bar s_i]` and :math:`\alpha_{c'} = 1[\|\nabla f_{c'}\| < \delta
    s_{i,c'}]`. The paper's appendix weighs dynamically too, but by indicators that were not published; these are ours.

    Args:
        target: (B,) squared sensitivities of the true logit.
        irrelevant: (B, K) of the other logits.
        target_goal: (B,) the goal :math:`\kappa\bar s_i`, unsquared.
        irrelevant_goal: (B, K) the goals :math:`\delta s_{i,c'}`, unsquared.

    Returns:
        Both weights, 0 or 1, without gradient.
    """
    with torch.no_grad():
        return (target > target_goal**2).to(target.dtype), (irrelevant < irrelevant_goal**2).to(target.dtype)


def relative_learning_rate(rho: float, target: float, gradient_norm_squared: float) -> float:
    r"""The learning rate :math:`\eta = \rho\,\overline{\|\nabla f_c\|^2} / \|\nabla_w L\|^2`, both measured at w_0.

    To first order a step on a loss :math:`\overline{\|\nabla f_c\|^2}` alone would lower it by the share ρ. A constant
    factor on the logits or on the input leaves the step as it is, and the value of ρ transfers across networks.

    Args:
        rho: the share ρ, above 0.
        target: mean squared sensitivity of the true logit, above 0.
        gradient_norm_squared: squared norm of the loss's gradient with respect to all weights.

    Returns:
        η.

    Raises:
        ValueError: the measurements allow no finite step.

    Example:
        >>> relative_learning_rate(0.03, target=2.0, gradient_norm_squared=6.0)
        0.01
    """
    if not (0 < gradient_norm_squared < math.inf and 0 < target < math.inf):
        raise ValueError(
            f"the squared target sensitivity is {target:g} and the squared gradient norm {gradient_norm_squared:g} on "
            "the forget set, both must be positive and finite for a relative step: does the network's output depend on "
            "the image through its trainable weights?"
        )
    return rho * target / gradient_norm_squared


def has_recovered(ratio: float, smallest: float, delta: float = 1.0, min_dip: float = 0.02) -> bool:
    r"""The stop rule: the irrelevant sensitivity has dipped, risen again, and is above the threshold.

    :math:`\varepsilon_t \le 1 - \mathrm{min\_dip}`, :math:`r_t > \varepsilon_t` and :math:`r_t > \delta`. As published
    ``min_dip`` is 0, which stops at the first look when the ratio never dips.

    Args:
        ratio: :math:`r_t`, the mean irrelevant sensitivity as a share of that at w_0.
        smallest: :math:`\varepsilon_t = \min_{s \le t} r_s`, with :math:`r_0 = 1`.
        delta: threshold δ.
        min_dip: the dip that must have been seen, in [0, 1].

    Returns:
        Whether to stop.

    Example:
        >>> has_recovered(1.05, smallest=0.9), has_recovered(1.05, smallest=1.0)
        (True, False)
    """
    return smallest <= 1 - min_dip and ratio > smallest and ratio > delta


def recovery_step(ratios: Sequence[float], delta: float = 1.0, min_dip: float = 0.02) -> int:
    """The first place k ≥ 1 of a trace of ratios r_0, r_1, … at which :func:`has_recovered` holds; -1 for none.

    Args:
        ratios: the trace, r_0 first.
        delta: threshold δ.
        min_dip: the dip that must have been seen.

    Returns:
        The index, or -1.

    Example:
        >>> recovery_step([1.0, 0.9, 0.95, 1.02])
        3
    """
    smallest = math.inf
    for place, ratio in enumerate(ratios):
        smallest = min(smallest, ratio)
        if place and has_recovered(ratio, smallest, delta, min_dip):
            return place
    return -1
