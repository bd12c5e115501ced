"""SalUn: random labels, but only the weights that matter to the forget set move; hard and soft mask.

Source: Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508; official code
https://github.com/OPTML-Group/Unlearn-Saliency (``Classification/``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_within
from torchlethe.components import SaliencyMask
from torchlethe.components.sample_gradients import batch_gradients, zeros_like
from torchlethe.functional.forget_losses import soft_threshold
from torchlethe.updates.base import BatchNormMode, OptimizerFactory
from torchlethe.updates.relabelled import Order, RelabelledUpdate


def salun_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the learning rate 0.013 of the official code for 10 %."""
    return SGD(parameters, lr=0.013, momentum=0.9, weight_decay=5e-4)


class SalUnUpdate(RelabelledUpdate):
    """Random labels with a hard mask on the gradient.

    The mask keeps the weights with the largest |Σ_batches ∇CE| over the forget set at the original model (eval mode,
    absolute value after the sum), measured once.

    Args:
        optimizer: makes the optimizer from the parameters.
        mask_fraction: share of the weights that move, in [0, 1].
        strict_mask: hold the other weights, and their optimizer state, exactly; without it weight decay and momentum
            move them, as in the official code before it was corrected.
        order: see :class:`~torchlethe.updates.relabelled.RelabelledUpdate`.
        labels: likewise.
        redraw: likewise.
        seed: likewise.
        bn_mode: likewise.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP the score is that of the joined batches, so all ranks have one mask.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = salun_optimizer,
        mask_fraction: float = 0.5,
        strict_mask: bool = True,
        order: Order = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, order, labels, redraw, seed, bn_mode)
        check_within(0, 1, mask_fraction=mask_fraction)
        self.mask_fraction = mask_fraction
        self.strict_mask = strict_mask
        self.parameters: dict[str, nn.Parameter] = {}
        self.mask: SaliencyMask | None = None
        self.held: list[Tensor] = []
        self.free: list[Tensor] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters; forgets an earlier run's mask."""
        self.prepared, self.mask = False, None
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure the saliency on the forget set and make the mask."""
        sums = zeros_like(self.parameters.values())
        for gradients, samples in batch_gradients(network, loaders["forget"]):
            torch._foreach_add_(sums, torch._foreach_div(gradients, samples))
        scores = dict(zip(self.parameters, torch._foreach_abs(sums), strict=True))
        self._use(SaliencyMask.from_top_fraction(scores, self.mask_fraction))
        layers = {f"mask_kept/{name}": share for name, share in self.mask.kept_fractions().items()}  # type: ignore[union-attr]
        return super().prepare(network, loaders) | layers

    def _use(self, mask: SaliencyMask) -> None:
        self.mask = mask.like(self.parameters)
        if self.strict_mask:
            # masked weights never move, so those of a resumed run are still the original ones
            self.held = [p.detach().clone() for p in self.parameters.values()]
            self.free = [m.bool() for m in self.mask.select(self.parameters)]

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The relabelled cross-entropy."""
        if self.mask is None:
            raise RuntimeError("SalUnUpdate was used before configure(network) and prepare(network, loaders).")
        return super().loss(network, batch, k)

    def before_optimizer_step(self) -> None:
        """Mask the gradients."""
        moved = {name: p for name, p in self.parameters.items() if p.grad is not None}
        gradients: list[Any] = [p.grad for p in moved.values()]
        torch._foreach_mul_(gradients, self.mask.select(moved))  # type: ignore[union-attr]

    @torch.no_grad()
    def after_optimizer_step(self, k: int) -> None:
        """Put masked weights back, and their optimizer state to zero."""
        if not self.strict_mask:
            return
        (optimizer,) = self.optimizers
        for p, held, free in zip(self.parameters.values(), self.held, self.free, strict=True):
            torch.where(free, p, held, out=p.data)
            for state in optimizer.state.get(p, {}).values():
                if isinstance(state, Tensor) and state.shape == p.shape and state.dim():
                    state.mul_(free)

    def state_dict(self) -> dict[str, Any]:
        """The mask, one bit a weight."""
        return super().state_dict() | {"mask": self.mask.state_dict() if self.mask else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the weights must be those of the checkpoint already."""
        super().load_state_dict(state)
        if state["mask"]:
            self._use(SaliencyMask.from_state_dict(state["mask"], next(iter(self.parameters.values())).device))


class SalUnSoftUpdate(RelabelledUpdate):
    """Random labels with soft-thresholded changes in place of a mask.

    After step k of K the change Δ = θ − θ0 shrinks by the r-th smallest |Δ|, r = ⌊mask_ratio·(1 − k/K)·P⌋ of P weights:
    at first that share of the weights stays at θ0, at the end hardly any. The official code takes θ0 anew in every
    epoch and in one branch forgets the step within the epoch; both are faults and corrected here.

    Args:
        optimizer: makes the optimizer from the parameters.
        mask_ratio: share of the weights that do not move at first, in [0, 1].
        order: see :class:`~torchlethe.updates.relabelled.RelabelledUpdate`.
        labels: likewise.
        redraw: likewise.
        seed: likewise.
        bn_mode: likewise.

    Raises:
        ValueError: an argument is out of range.

    Note:
        The original weights are kept, also in the state. A plain loop calls ``set_length`` first.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = salun_optimizer,
        mask_ratio: float = 0.5,
        order: Order = "sequential",
        labels: Literal["all", "other"] = "all",
        redraw: Literal["epoch", "once"] = "epoch",
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, order, labels, redraw, seed, bn_mode)
        check_within(0, 1, mask_ratio=mask_ratio)
        self.mask_ratio = mask_ratio
        self.parameters: list[Tensor] = []
        self.original: list[Tensor] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters; forgets an earlier run's original weights."""
        self.prepared = False
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.original = []
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Keep the original weights."""
        self.required_length()
        self.original = [p.detach().clone() for p in self.parameters]
        return super().prepare(network, loaders)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The relabelled cross-entropy."""
        if not self.original:
            raise RuntimeError("SalUnSoftUpdate was used before configure(network) and prepare(network, loaders).")
        return super().loss(network, batch, k)

    @torch.no_grad()
    def after_optimizer_step(self, k: int) -> None:
        """Shrink the changes."""
        steps, _ = self.required_length()
        changes = torch._foreach_sub(self.parameters, self.original)
        magnitude = torch.cat([change.abs().flatten() for change in changes])
        rank = int(self.mask_ratio * max(0.0, 1 - k / steps) * magnitude.numel())
        if rank:
            threshold = magnitude.kthvalue(rank).values
            shrunk = [soft_threshold(change, threshold) for change in changes]
            torch._foreach_copy_(self.parameters, torch._foreach_add(self.original, shrunk))

    def state_dict(self) -> dict[str, Any]:
        """The original weights."""
        return super().state_dict() | {"original": list(self.original)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.original = [saved.to(p) for saved, p in zip(state["original"], self.parameters, strict=True)]
