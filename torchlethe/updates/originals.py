"""What rules share that compare the network with the one they started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchlethe.components.originals import frozen_copy, matched, weights_hash


class KeepsOriginal:
    """A mixin for update rules with a frozen copy of the original network, outside of every state dict.

    The copy is made by ``configure``, or before it by :meth:`keep_original`, which a Trainer calls before it restores a
    checkpoint: a resumed run compares with the original weights, not with those it goes on from. A run that is resumed
    with other original weights is refused.
    """

    _given: nn.Module | None = None
    _original: nn.Module | None = None
    _hash: str = ""

    def keep_original(self, network: nn.Module) -> None:
        """Copy a network as the original of the next run."""
        self._given = frozen_copy(network)

    def place_original(self, network: nn.Module) -> None:
        """Take the copy that was kept, or make one, and match its device and precision; for ``configure``."""
        given, self._given = self._given, None
        self._original = matched(frozen_copy(network) if given is None else given, network)
        self._hash = weights_hash(self._original)

    @property
    def original(self) -> nn.Module:
        """The frozen original, in eval mode.

        Raises:
            RuntimeError: ``configure`` was not called.
        """
        if self._original is None:
            raise RuntimeError(f"{type(self).__name__} has no original network before configure(network).")
        return self._original

    def original_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the original: its hash."""
        return {"original": self._hash}

    def check_original(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of a run with another original.

        Raises:
            ValueError: the hashes differ.
        """
        if self._hash and state["original"] != self._hash:
            raise ValueError(
                f"the checkpoint was made with the original weights {state['original'][:12]}…, this run starts from "
                f"{self._hash[:12]}…: pass the network or weights that the run began with."
            )
