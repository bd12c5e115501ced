"""How ranks share the passes over evaluation sets and bring the rows together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

Positions = Callable[[int], Tensor]


def own_batches(
    loader: Iterable[Any], rank: int, world: int, *, count: Callable[[Any], int], limit: int | None = None
) -> Iterator[tuple[Any, Tensor, bool]]:
    """One rank's batches of an evaluation set, whatever loader it is.

    A loader with a distributed sampler of ``world`` replicas is a share already. Any other is the same on all ranks,
    which take its batches in turn; ranks that would get fewer repeat the last one, as sharded networks need all ranks
    in each forward.

    Args:
        loader: yields batches in a fixed order.
        rank: this rank.
        world: number of ranks.
        count: number of samples in a batch.
        limit: at most so many batches for each rank.

    Yields:
        The batch; the positions (B,) int64 of its samples in the set, −1 for what a stock distributed sampler added
        behind the end; and whether the batch is a repetition whose rows do not count.

    Example:
        >>> for batch, positions, repeated in own_batches(["ab", "c", "de"], rank=1, world=2, count=len):
        ...     print(batch, positions.tolist(), repeated)
        c [2] False
        de [0, 1] True
    """
    sampler = getattr(loader, "sampler", None)
    shared = isinstance(sampler, DistributedSampler) and sampler.num_replicas == world
    taken = offset = 0
    last: Any = None
    for number, batch in enumerate(loader):
        if limit is not None and number >= limit * (1 if shared else world):
            break
        rows = torch.arange(offset, offset + count(batch))
        offset, taken, last = offset + len(rows), number + 1, batch
        if shared:
            spread = rows * world + rank
            yield batch, torch.where(spread < len(sampler.dataset), spread, -1), False  # type: ignore[union-attr]
        elif number % world == rank:
            yield batch, rows, False
    if not shared and 0 < taken % world <= rank:
        yield last, torch.arange(count(last)), True


def gather_rows(
    rows: Tensor,
    all_gather: Callable[[Tensor], Tensor],
    *,
    keep: bool,
    device: torch.device,
    chunk: int = 1 << 16,
) -> Tensor:
    """Bring the rows of all ranks together, also when their numbers differ.

    Args:
        rows: (N, …) of this rank, on the CPU; the trailing shape and the dtype are equal on all ranks.
        all_gather: collective that maps a tensor of equal shape on all ranks to (ranks, …).
        keep: whether this rank keeps the result; the others receive nothing.
        device: where the collective works.
        chunk: rows per collective, which bounds the memory on the device.

    Returns:
        All rows in the order of ranks, on the CPU, or (0, …) where ``keep`` is false.
    """
    counts = [int(n) for n in all_gather(torch.tensor(len(rows), device=device)).flatten()]
    gathered: list[list[Tensor]] = [[rows[:0]] for _ in counts]
    for start in range(0, max(counts), chunk):
        width = min(chunk, max(counts) - start)
        piece = rows.new_zeros((width, *rows.shape[1:]))
        own = rows[start : start + width]
        piece[: len(own)] = own
        everyone = all_gather(piece.to(device))
        for rank, total in enumerate(counts if keep else []):
            gathered[rank].append(everyone[rank, : max(0, min(width, total - start))].cpu())
    return torch.cat([part for parts in gathered for part in parts])
