"""Sums over ranks that are the identity in a single process."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """The number of ranks, 1 when no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, without gradient.

    Args:
        tensor: any shape; every rank passes the same shape and dtype.

    Returns:
        The sum; the tensor itself (detached) in a single process.
    """
    tensor = tensor.detach()
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, for checkpoints of per-rank sums: restored on each rank, the total is kept.

    Args:
        tensor: floating, or integers in a single process; every rank passes the same shape and dtype, or none does.

    Returns:
        The mean, floating where there is more than one rank; the tensor itself (detached) in a single process.
    """
    return all_reduce_sum(tensor) / world_size() if world_size() > 1 else tensor.detach()


def all_reduce_sum_many(tensors: list[Tensor]) -> list[Tensor]:
    """Sum a list of tensors over all ranks with one message for each dtype; see :func:`all_reduce_sum`."""
    if world_size() == 1:
        return [tensor.detach() for tensor in tensors]
    result: list[Tensor] = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = all_reduce_sum(torch.cat([tensors[i].flatten() for i in places]))
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            result[i] = part.view_as(tensors[i])
    return result


def gather_in_order(rows: Tensor) -> Tensor:
    """Join the rows of all ranks in stored order, where rank r holds every W-th row from the r-th on.

    Args:
        rows: ``(n, ...)``, on every rank as many; without gradient.

    Returns:
        ``(W * n, ...)``, padding rows at the end; the tensor itself in a single process.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)
