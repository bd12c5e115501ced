"""A long preparation goes on where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LAYOUT = 1
"""Number of what snapshots hold; those of another number are not read."""


class Snapshots:
    """States of a preparation on its way, for those that take hours.

    A preparation asks :meth:`take` for where to start, and calls :meth:`offer` after each of its steps; every rank
    does the same, so one of them writes.

    Args:
        found: the last state of an earlier run, or None.
        write: stores a state in place of the last one; None to store nothing.
        every: seconds between two states.

    Example:
        >>> states = []
        >>> snapshots = Snapshots(write=states.append, every=0)
        >>> snapshots.offer(lambda: {"step": 1})
        >>> Snapshots(found=states[-1]).take()
        {'step': 1}
    """

    def __init__(
        self,
        found: Mapping[str, Any] | None = None,
        write: Callable[[dict[str, Any]], object] | None = None,
        every: float = 60.0,
    ) -> None:
        self.found, self.write, self.every = found, write, every
        self._last = time.monotonic()

    def take(self) -> Mapping[str, Any] | None:
        """The state to start from, handed over once: it can be as large as the data set."""
        found, self.found = self.found, None
        return found

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Store ``state()``, if it is time."""
        if self.write is not None and time.monotonic() - self._last >= self.every:
            self.write(state())
            self._last = time.monotonic()


def training_state(device: torch.device | str, **parts: Any) -> dict[str, Any]:
    """Where a training is: tensors, plain values, ``state_dict()`` of all else, and torch's random generators.

    Args:
        device: where it runs.
        parts: by name.
    """
    place = torch.device(device)
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    state["random"] = torch.get_rng_state()
    if place.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(place)
    return state


@torch.no_grad()
def restore_training(state: Mapping[str, Any], device: torch.device | str, **parts: Any) -> None:
    """Bring tensors and parts with ``load_state_dict`` to a state of :func:`training_state`, and the generators too."""
    for name, part in parts.items():
        if isinstance(part, Tensor):
            part.copy_(state[name])
        else:
            part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    if "random_cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["random_cuda"], torch.device(device))
