"""Which data an unlearning method reads, and how: feeds declare it, one loader serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.samplers import RoleSampler

Role = Literal["forget", "remain", "train", "validation"]
ROLES: tuple[Role, ...] = ("forget", "remain", "train", "validation")


class Feed:
    """What a method reads (:attr:`roles`) and in which order (:meth:`plan`).

    A draw is the number of batches of a role that were read before: draw d of a role with n batches per pass is batch
    ``d % n`` of its pass ``d // n``.
    """

    augment: bool = True

    @property
    def roles(self) -> frozenset[str]:
        """The roles it reads."""
        return frozenset({"forget", "remain"})

    def length(self, batches: Mapping[str, int]) -> int:
        """Steps of one loader epoch, given the batches per pass of each role."""
        raise NotImplementedError

    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        """For each step of a loader epoch, the draw of each role that it reads."""
        raise NotImplementedError

    def without(self, role: str) -> str | None:
        """What to tell a user whose data has no such role, in a sentence; None for the general one."""
        return None

    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        """The training loader of a feed that makes its own data set out of the roles; None otherwise.

        The arguments are those of :func:`feed_loader`, which calls this.
        """
        return None


@dataclass(frozen=True)
class Single(Feed):
    """Plain batches of one role, a pass an epoch.

    Args:
        role: One of forget, remain, train, validation.
        augment: Whether a datamodule augments these batches; False for what evaluation sees.

    Raises:
        ValueError: If ``role`` is none of these.
    """

    role: Role
    augment: bool = True

    def __post_init__(self) -> None:
        check_choice(ROLES, role=self.role)

    @property
    def roles(self) -> frozenset[str]:
        """The one role."""
        return frozenset({self.role})

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches[self.role]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        start = epoch * batches[self.role]
        return ({self.role: start + step} for step in range(batches[self.role]))


@dataclass(frozen=True)
class Interleaved(Feed):
    """A remaining batch at every step, a forget batch besides at every ``every``-th; SFRon's order F, R, …, R.

    Args:
        every: Step k reads a forget batch when k is a multiple of it.
        steps: Steps of one loader epoch; by default a pass over the remaining data.

    Raises:
        ValueError: If an argument is not positive.

    >>> list(Interleaved(every=2, steps=3).plan({"forget": 5, "remain": 9}))
    [{'forget': 0, 'remain': 0}, {'remain': 1}, {'forget': 1, 'remain': 2}]
    """

    every: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, every=self.every)
        if self.steps is not None:
            check_at_least(1, steps=self.steps)

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches["remain"] if self.steps is None else self.steps

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        steps = self.length(batches)
        forgets = -(-steps // self.every)
        for k in range(steps):
            forget = {} if k % self.every else {"forget": epoch * forgets + k // self.every}
            yield {**forget, "remain": epoch * steps + k}


@dataclass(frozen=True)
class Paired(Feed):
    """A forget and a remaining batch at every step; an epoch is a pass over the longer, the shorter is cycled."""

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return max(batches[role] for role in self.roles)

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        steps = self.length(batches)
        return ({"forget": epoch * steps + k, "remain": epoch * steps + k} for k in range(steps))


@dataclass(frozen=True)
class Sequential(Feed):
    """A pass over the forget data, then one over the remaining data; one role a step."""

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches["forget"] + batches["remain"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        for role in ("forget", "remain"):
            yield from ({role: epoch * batches[role] + k} for k in range(batches[role]))


@dataclass(frozen=True)
class Joined(Feed):
    """Plain batches of the shuffled union of both, with ``is_forget`` (B,) bool."""

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches["joined"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        start = epoch * batches["joined"]
        return ({"joined": start + step} for step in range(batches["joined"]))


class JoinedDataset(Dataset[Any]):
    """The union of a forget and a remaining set; batches carry ``is_forget`` (B,) bool.

    Args:
        forget: Data set with ``__getitems__``.
        remain: Likewise.
    """

    def __init__(self, forget: Dataset[Any], remain: Dataset[Any]) -> None:
        self.forget, self.remain = forget, remain

    def __len__(self) -> int:
        return len(self.forget) + len(self.remain)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """Read a whole batch of the union: positions of the forget set first, then those of the remaining set."""
        asked = torch.as_tensor(positions)
        border = len(self.forget)  # type: ignore[arg-type]
        is_forget = asked < border
        parts = []
        if is_forget.any():
            parts.append(self.forget.__getitems__(asked[is_forget]))  # type: ignore[attr-defined]
        if not is_forget.all():
            parts.append(self.remain.__getitems__(asked[~is_forget] - border))  # type: ignore[attr-defined]
        back = torch.cat([is_forget.nonzero(), (~is_forget).nonzero()]).flatten().argsort()
        batch = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
        return {**batch, "is_forget": is_forget}


class RoleDataset(Dataset[Any]):
    """Data sets by role; an item is a whole step as :class:`~torchlethe.data.RoleSampler` names it."""

    def __init__(self, datasets: Mapping[str, Dataset[Any]]) -> None:
        self.datasets = dict(datasets)

    def __len__(self) -> int:
        return max(len(dataset) for dataset in self.datasets.values())  # type: ignore[arg-type]

    def __getitem__(self, step: dict[str, tuple[int, list[int]]]) -> dict[str, dict[str, Any]]:
        batches = {}
        for role, (number, positions) in step.items():
            batch = self.datasets[role].__getitems__(positions)  # type: ignore[attr-defined]
            batches[role] = {**batch, "epoch": torch.full_like(batch["index"], number)}
        return batches


class RoleLoader(PositionedLoader):
    """A :class:`PositionedLoader` whose batches are whole steps: a dict from role to batch.

    Roles that a step does not read are absent from it, and data of roles that the feed does not name is dropped here
    without being touched. ``epoch`` of a role's batch counts the passes over that role's data.

    Args:
        datasets: Data set of each role.
        feed: :class:`Interleaved`, :class:`Paired` or :class:`Sequential`.
        batch_size: Samples of a role per step and rank: one number, or one for each role.
        seed: Order seed, equal on all ranks.
        num_replicas: Number of ranks; by default that of ``torch.distributed``, or 1.
        rank: This rank; by default that of ``torch.distributed``, or 0.
        **kwargs: Further arguments of ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: If a role of the feed has no data.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        feed: Feed,
        batch_size: int | Mapping[str, int] = 128,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        named = {role: datasets[role] for role in sorted(feed.roles) if role in datasets}
        if missing := [role for role in sorted(feed.roles) if role not in named or not len(named[role])]:  # type: ignore[arg-type]
            raise ValueError(f"datasets has no samples for the role {missing[0]!r}, but {feed} reads it.")
        for size in [batch_size] if isinstance(batch_size, int) else batch_size.values():
            check_at_least(1, batch_size=size)
        # Lightning may re-create a loader with another sampler (`overfit_batches`); the order of roles is the feed's.
        for injected in ("sampler", "batch_sampler", "shuffle", "drop_last"):
            kwargs.pop(injected, None)
        sizes = {role: len(dataset) for role, dataset in named.items()}  # type: ignore[arg-type]
        sampler = RoleSampler(feed, sizes, batch_size, num_replicas, rank, seed)
        super().__init__(RoleDataset(named), batch_size=None, sampler=sampler, **kwargs)

    def tag(self, batch: Any, epoch: int) -> Any:
        """Leave a step as it is: its batches carry the pass numbers of their roles."""
        return batch


def feed_loader(
    feed: Feed, role_set: Callable[[str], Dataset[Any]], batch_size: int, seed: int = 0, **kwargs: Any
) -> PositionedLoader:
    """The training loader that serves a feed.

    Args:
        feed: What to read and how.
        role_set: Gives the data set of a role; asked only for the roles that the feed names.
        batch_size: Samples of a role per step and rank.
        seed: Order seed, equal on all ranks.
        **kwargs: Further arguments of the loader.

    Returns:
        A :class:`RoleLoader`, or for :class:`Single` and :class:`Joined` a :class:`PositionedLoader` of plain batches.
    """
    if (own := feed.loader(role_set, batch_size, seed, **kwargs)) is not None:
        return own
    if isinstance(feed, Single):
        return PositionedLoader(role_set(feed.role), batch_size=batch_size, shuffle=True, seed=seed, **kwargs)
    if isinstance(feed, Joined):
        union = JoinedDataset(role_set("forget"), role_set("remain"))
        return PositionedLoader(union, batch_size=batch_size, shuffle=True, seed=seed, **kwargs)
    return RoleLoader({role: role_set(role) for role in sorted(feed.roles)}, feed, batch_size, seed, **kwargs)
