"""Influence unlearning: one Newton-like step away from the forget set.

Source: Izzo et al. 2021 and Koh and Liang 2017 for the idea; the published baseline "IU" ("WoodFisher") is that of
https://github.com/OPTML-Group/Unlearn-Saliency.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_above, check_at_least, check_choice
from torchlethe.components import world_size
from torchlethe.components.kfac import KroneckerFisher
from torchlethe.components.sample_gradients import (
    curvature_product,
    directional_derivatives,
    mean_gradient,
    plain_batch,
    trainable,
)
from torchlethe.data import PADDING_LABEL
from torchlethe.functional.editing import woodfisher_multiple
from torchlethe.updates.weight_editor import WeightEditor


class InfluenceUpdate(WeightEditor):
    r"""Add :math:`\alpha k` with k from :math:`v = (N_f/N)(\bar g_f - \bar g_r)`, the mean gradients at the start.

    For a network that is at a minimum of the loss on all data, v is the negative gradient of the loss on the remaining
    data, and :math:`H_r^{-1} v` is the Newton step to the minimum on these.

    Args:
        inverse: ``as_coded``, the published recursion over ``samples`` single remaining samples, which never leaves v
            plus a multiple of the first sample's gradient, so it is a first-order step; ``true_woodfisher``, what that
            recursion is meant to compute, the inverse of the damped empirical Fisher information of the remaining data;
            ``cg``, that of the damped Gauss-Newton matrix, the real thing; ``kfac``, that of its Kronecker-factored
            approximation (:class:`~torchlethe.components.kfac.KroneckerFisher`); ``none``, k = v.
        alpha: length of the step; for ``cg`` 1 is the Newton step. It has to be tuned.
        samples: remaining samples of the recursion, at most (``as_coded``).
        n0: the recursion's constant (``as_coded``).
        damping: added to the diagonal of the matrix, above 0 (``true_woodfisher``, ``cg`` and ``kfac``).
        iterations: of conjugate gradients, at most (``true_woodfisher`` and ``cg``).
        batches: remaining batches for the matrix; None takes all (``true_woodfisher``, ``cg`` and ``kfac``).
        seed: of the labels that ``kfac`` draws from the network's predictions.

    Raises:
        ValueError: an argument is out of range.

    Note:
        ``true_woodfisher`` solves with conjugate gradients and matrix-free products, so no vector is stored for each
        sample; the recursion itself, with the inverse of the damping as its start, ends in the same vector.
        ``as_coded`` needs inner products only and gets them by forward-mode differentiation in batches, in place of
        1002 backward passes of single samples. Under DDP the result is that of one process with the joined batches.
    """

    def __init__(
        self,
        inverse: Literal["as_coded", "true_woodfisher", "cg", "kfac", "none"] = "as_coded",
        alpha: float = 1.0,
        samples: int = 1002,
        n0: float = 1000.0,
        damping: float = 1e-2,
        iterations: int = 20,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__("forget", "remain")
        check_choice(("as_coded", "true_woodfisher", "cg", "kfac", "none"), inverse=inverse)
        check_at_least(1, samples=samples, iterations=iterations, batches=1 if batches is None else batches)
        check_above(0, n0=n0, damping=damping)
        self.inverse, self.alpha, self.samples, self.n0 = inverse, alpha, samples, n0
        self.damping, self.iterations, self.batches, self.seed = damping, iterations, batches, seed
        self.direction: list[Tensor] = []

    def measure(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Find the direction k."""
        forget, forget_size = mean_gradient(network, loaders["forget"])
        remain, remain_size = mean_gradient(network, loaders["remain"])
        target = list(torch._foreach_sub(forget, remain))
        torch._foreach_mul_(target, forget_size / (forget_size + remain_size))
        logs = {"influence_target_norm": float(_norm(target))}
        self.direction = target
        if self.inverse == "as_coded":
            self.direction = self._recursion(network, loaders["remain"], target)
        elif self.inverse == "kfac":
            fisher = KroneckerFisher(network, islice(loaders["remain"], self.batches), self.seed)
            self.direction = fisher.solve(target, self.damping)
        elif self.inverse in ("cg", "true_woodfisher"):
            self.direction, residual = self._conjugate_gradients(network, loaders["remain"], target)
            logs["influence_residual"] = residual
        return logs | {"influence_norm": float(_norm(self.direction))}

    def _recursion(self, network: nn.Module, loader: Iterable[Any], target: list[Tensor]) -> list[Tensor]:
        first = first_gradient(network, loader)
        table = directional_derivatives(network, loader, [first, target], self.samples)
        multiple = woodfisher_multiple(table[:, 0], table[:, 1], self.n0)
        return list(torch._foreach_add(target, first, alpha=multiple))

    def _conjugate_gradients(
        self, network: nn.Module, loader: Iterable[Any], target: list[Tensor]
    ) -> tuple[list[Tensor], float]:
        solution = [torch.zeros_like(t) for t in target]
        residual, direction = list(target), list(target)
        squared = start = _dot(residual, residual)
        if not float(start):
            return solution, 0.0  # both gradients are zero, as where every loss is exactly 0
        kind: Literal["gauss_newton", "empirical"] = "gauss_newton" if self.inverse == "cg" else "empirical"
        for _ in range(self.iterations):
            product = curvature_product(network, islice(loader, self.batches), direction, kind)
            torch._foreach_add_(product, direction, alpha=self.damping)
            step = squared / _dot(direction, product)
            solution = list(torch._foreach_add(solution, torch._foreach_mul(direction, step)))
            residual = list(torch._foreach_sub(residual, torch._foreach_mul(product, step)))
            before, squared = squared, _dot(residual, residual)
            if float(squared) <= 1e-12 * float(start):
                break
            direction = list(torch._foreach_add(residual, torch._foreach_mul(direction, squared / before)))
        return solution, float((squared / start.clamp_min(1e-300)).sqrt())

    @torch.no_grad()
    def edit(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Take the step."""
        weights: list[Tensor] = list(trainable(network).values())
        torch._foreach_add_(weights, [d.to(w) for d, w in zip(self.direction, weights, strict=True)], alpha=self.alpha)
        length = self.alpha * _norm(self.direction)
        self.direction = []
        return {"edit_norm": length}


def first_gradient(network: nn.Module, loader: Iterable[Any]) -> list[Tensor]:
    """Gradient of the cross-entropy of a loader's very first sample, that of rank 0 under DDP."""
    batch = plain_batch(next(iter(loader)))
    label = batch["label"][:1]
    if world_size() > 1 and torch.distributed.get_rank() > 0:
        label = torch.full_like(label, PADDING_LABEL)  # counts for nothing
    return mean_gradient(network, [{"image": batch["image"][:1], "label": label}])[0]


def _dot(first: list[Tensor], second: list[Tensor]) -> Tensor:
    return torch.stack([p.sum() for p in torch._foreach_mul(first, second)]).sum()


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()
