"""What happens to gradients between backward pass and optimizer: sums over ranks and micro-batches, loss scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchlethe.components.distributed import all_reduce_sum_many, world_size


class GradientSync:
    """Whether a backward pass averages gradients over ranks; does nothing without DDP.

    Args:
        trainer: the Trainer, after its strategy was set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        model = trainer.strategy.model
        self.ddp = model if isinstance(model, DistributedDataParallel) else None

    @property
    def in_bucket(self) -> bool:
        """Whether gradients live in DDP's own memory, which the next synchronised backward pass overwrites."""
        return self.ddp is not None and bool(self.ddp.gradient_as_bucket_view)

    def switch(self, on: bool) -> None:
        """Say it before the forward pass, which is where DDP looks."""
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = on

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over ranks in place, with one message."""
        tensors = list(tensors)
        if self.ddp is None or not tensors or world_size() == 1:
            return
        for tensor, total in zip(tensors, all_reduce_sum_many(tensors), strict=True):
            tensor.copy_(total / world_size())

    def any_rank(self, flag: Tensor) -> bool:
        """Whether a flag is up on any rank; without an answer that is the same on all, ranks would part ways."""
        if self.ddp is not None and world_size() > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


class GradientScale:
    """What lies between a gradient as it is and that of the mean loss: the micro-batches, and the loss scale of fp16.

    Args:
        trainer: the Trainer.
        sync: how ranks are averaged.
    """

    def __init__(self, trainer: Trainer, sync: GradientSync) -> None:
        self.trainer, self.sync = trainer, sync

    @property
    def scaler(self) -> Any:
        """The loss scaler of fp16; None otherwise."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def is_one(self) -> bool:
        """Whether gradients are those of the mean loss already."""
        return self.scaler is None and self.trainer.accumulate_grad_batches == 1

    def of(self, loss: Tensor) -> Tensor:
        """The loss that Lightning would take to the backward pass."""
        loss = loss / self.trainer.accumulate_grad_batches
        return loss if self.scaler is None else self.scaler.scale(loss)

    def loss_scale(self) -> Any:
        """The loss scale of fp16, a tensor; 1.0 in other precisions."""
        return 1.0 if self.scaler is None else self.scaler._get_scale_async()

    def remove_(self, grads: list[Tensor]) -> bool:
        """Bring gradients to the scale of the mean loss, in place.

        Returns:
            False if fp16 made one infinite, on any rank.
        """
        count = float(self.trainer.accumulate_grad_batches)
        if self.scaler is not None:
            factor = count / self.loss_scale()
            found = torch.zeros_like(factor)
            if grads:
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found, factor)
            return not self.sync.any_rank(found)
        if count != 1:
            torch._foreach_mul_(grads, count)
        return True

    def apply_(self, grads: list[Tensor]) -> None:
        """The opposite of :meth:`remove_`, in place."""
        if not self.is_one:
            torch._foreach_mul_(grads, self.loss_scale() / self.trainer.accumulate_grad_batches)


def leave(params: list[Tensor], grads: list[Tensor], older: Mapping[Tensor, Tensor]) -> None:
    """Leave gradients to the optimizer, added to those of earlier micro-batches.

    Args:
        params: the parameters.
        grads: their gradients, changed in place.
        older: what was accumulated before, of any parameters.
    """
    sums = [(grad, older[param]) for param, grad in zip(params, grads, strict=True) if param in older]
    if sums:
        torch._foreach_add_([grad for grad, _ in sums], [old for _, old in sums])
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    for param in older.keys() - set(params):
        param.grad = older[param]
