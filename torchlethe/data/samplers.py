"""Samplers whose order is a pure function of (seed, epoch) and that know their position in it.

Both subclass ``DistributedSampler``, so Lightning leaves a loader that carries one alone under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from torchlethe.data.hashing import generator_for, mix_seed


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The shuffled order of one pass.

    Args:
        size: Number of samples.
        seed: Order seed.
        epoch: Number of the pass.

    Returns:
        (size,) int64, a permutation that depends on the three arguments only.
    """
    return torch.randperm(size, generator=generator_for("order", seed, epoch))


def shard(order: Tensor, num_replicas: int, rank: int, *, flag_padding: bool, drop_last: bool = False) -> Tensor:
    """The part of a global order that one rank reads.

    With per-rank batches of size b, batch j of all ranks together holds exactly ``order[j*b*W:(j+1)*b*W]``. That needs
    sizes divisible by the number of ranks; otherwise the last batch of a pass repeats up to W-1 samples, or without
    repeats loses as many (``drop_last``).

    Args:
        order: (N,) int64 global order.
        num_replicas: Number of ranks W.
        rank: This rank.
        flag_padding: How the order is filled up to a multiple of W: False wraps around to its beginning (training, as
            torch's ``DistributedSampler``: the repeated samples count twice in the last batch), True appends flagged
            duplicates ``~position`` (evaluation), which data sets label -100 and which count nowhere.
        drop_last: Cut the order down to a multiple of W instead.

    Returns:
        (ceil(N / W),) int64, or (floor(N / W),) with ``drop_last``.
    """
    if drop_last:
        order = order[: len(order) // num_replicas * num_replicas]
    elif missing := -len(order) % num_replicas:
        padding = order.repeat(-(-missing // len(order)))[:missing]
        order = torch.cat([order, ~padding if flag_padding else padding])
    return order[rank::num_replicas]


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    joined = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if joined else 1
    if rank is None:
        rank = dist.get_rank() if joined else 0
    return num_replicas, rank


class _Positioned(DistributedSampler[Any]):
    """Position of a pass: the epoch, and how many batches of it were handed out."""

    epoch: int
    batches: int = 0
    resumed: bool = False

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of a pass, unless the sampler already is in it (as after a resume)."""
        if epoch != self.epoch:
            self.epoch, self.batches, self.resumed = epoch, 0, False

    def seek(self, epoch: int, batches: int) -> None:
        """Let the next iteration continue a pass after ``batches`` of its batches."""
        self.epoch, self.batches, self.resumed = epoch, batches, True


class PositionedSampler(_Positioned):
    """Positions of one rank, in an order that depends on (seed, epoch) only.

    Global batch j of W ranks with batch size b holds ``order[j*b*W:(j+1)*b*W]``; rank r takes every W-th of these,
    from the r-th on: W ranks with batch size b read together what one process with batch size b·W reads. In training
    this holds for sizes divisible by the number of ranks; otherwise the last batch of a pass repeats up to W-1 samples,
    unflagged, as torch's ``DistributedSampler`` does, and W ranks differ slightly from one. ``drop_last`` avoids it.

    Args:
        dataset: Anything with a length.
        num_replicas: Number of ranks; by default that of ``torch.distributed``, or 1 where it is not initialised.
        rank: This rank; by default that of ``torch.distributed``, or 0.
        shuffle: True for training: a new order each epoch, padded by wrap-around. False for evaluation: stored order,
            padded by flagged duplicates (negative positions) that metrics skip.
        seed: Order seed, equal on all ranks.
        drop_last: Drop the samples that do not fill all ranks.

    >>> sampler = PositionedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
    >>> list(sampler)
    [1, 3, -1]
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        num_replicas, rank = _replicas(num_replicas, rank)
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        order = epoch_order(size, self.seed, self.epoch) if self.shuffle else torch.arange(size)
        part = shard(order, self.num_replicas, self.rank, flag_padding=not self.shuffle, drop_last=self.drop_last)
        return iter(part[self.skip :].tolist())


class RoleSampler(_Positioned):
    """Whole steps of an unlearning run: for each role that a step reads, its pass number and positions.

    Each role cycles through endless passes over its own data, each pass in a new order. Batches never span passes, so
    the last batch of a pass may be short. Ranks share batches as in :class:`PositionedSampler`, and read together what
    one process reads for roles with sizes divisible by the number of ranks; otherwise the last batch of a pass over the
    role repeats up to W-1 samples, unflagged.

    Args:
        feed: One of the feeds of :mod:`torchlethe.data.roles`.
        sizes: Number of samples of each role that the feed names.
        batch_size: Samples of a role per step and rank: one number, or one for each role.
        num_replicas: Number of ranks; by default that of ``torch.distributed``, or 1.
        rank: This rank; by default that of ``torch.distributed``, or 0.
        seed: Order seed, equal on all ranks.
    """

    def __init__(
        self,
        feed: Any,
        sizes: Mapping[str, int],
        batch_size: int | Mapping[str, int],
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        num_replicas, rank = _replicas(num_replicas, rank)
        super().__init__(range(max(sizes.values())), num_replicas, rank, True, seed)  # type: ignore[arg-type]
        self.feed, self.sizes, self.skip = feed, dict(sizes), 0
        self.batch_sizes = dict.fromkeys(sizes, batch_size) if isinstance(batch_size, int) else dict(batch_size)
        self.passes = {role: -(-size // (self.batch_sizes[role] * num_replicas)) for role, size in sizes.items()}

    def __len__(self) -> int:
        return self.feed.length(self.passes)

    def __iter__(self) -> Iterator[dict[str, tuple[int, list[int]]]]:
        current: dict[str, tuple[int, list[int]]] = {}
        for step, draws in enumerate(self.feed.plan(self.passes, self.epoch)):
            if step >= self.skip:
                yield {role: self._batch(role, draw, current) for role, draw in draws.items()}

    def _batch(self, role: str, draw: int, current: dict[str, tuple[int, list[int]]]) -> tuple[int, list[int]]:
        number, batch = divmod(draw, self.passes[role])
        if role not in current or current[role][0] != number:
            # the role's name salts the seed: equally large roles must not be shuffled alike
            order = epoch_order(self.sizes[role], mix_seed(self.seed, *role.encode()), number)
            current[role] = (number, shard(order, self.num_replicas, self.rank, flag_padding=False).tolist())
        size = self.batch_sizes[role]
        return number, current[role][1][batch * size : (batch + 1) * size]
