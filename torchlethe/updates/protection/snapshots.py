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

    A preparation calls :meth:`resume` before its first step, and :meth:`offer` after each; every rank does the same, so
    one of them writes. A state holds the parts that are given by name (tensors and plain values as they are, of all
    else the ``state_dict()``), and torch's random generators.

    Args:
        found: the last state of an earlier run, or None.
        write: stores a state in place of the last one; None to store nothing.
        every: seconds between two states.

    Example:
        >>> states = []
        >>> noise = torch.ones(2)
        >>> Snapshots(write=states.append, every=0).offer("cpu", noise=noise, done=3)
        >>> other = torch.zeros(2)
        >>> Snapshots(found=states[-1]).resume("cpu", noise=other)["done"], other
        (3, tensor([1., 1.]))
    """

    def __init__(
        self,
        found: Mapping[str, Any] | None = None,
        write: Callable[[dict[str, Any]], object] | None = None,
        every: float = 60.0,
    ) -> None:
        self.found, self.write, self.every = found, write, every
        self._last = time.monotonic()

    @torch.no_grad()
    def resume(self, device: torch.device | str, **parts: Any) -> Mapping[str, Any] | None:
        """Bring parts, and the random generators, to where an earlier run left them.

        Args:
            device: where the preparation runs.
            parts: tensors, and objects with ``load_state_dict``, by the names under which they were offered.

        Returns:
            The state, once, as it can be as large as the data set; None if there is none.
        """
        state, self.found = self.found, None
        if state is None:
            return None
        for name, part in parts.items():
            if isinstance(part, Tensor):
                part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and torch.device(device).type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], torch.device(device))
        return state

    def offer(self, device: torch.device | str, **parts: Any) -> None:
        """Store where the preparation is, if it is time.

        Args:
            device: where the preparation runs.
            parts: by name.
        """
        if self.write is None or time.monotonic() - self._last < self.every:
            return
        state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
        state["random"] = torch.get_rng_state()
        if torch.device(device).type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(torch.device(device))
        self.write(state)
        self._last = time.monotonic()
