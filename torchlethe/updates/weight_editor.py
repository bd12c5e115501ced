"""One-shot editors: measure on the data, change the weights once, done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from torchlethe.data import Feed
from torchlethe.updates.base import Backward, UpdateRule, plain_backward


@dataclass(frozen=True)
class OneStep(Feed):
    """A single step with a first batch of each role; what an editor measures, it reads in ``prepare``.

    Args:
        names: the roles.
    """

    names: frozenset[str]

    @property
    def roles(self) -> frozenset[str]:
        """The roles."""
        return self.names

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return 1

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        yield dict.fromkeys(sorted(self.names), epoch)


class WeightEditor(UpdateRule):
    """A rule without training: ``prepare`` measures, and the one step that follows edits the weights.

    The measurements read fixed images in a fixed order, with the network in eval mode. There is no optimizer; under a
    Trainer the run has one step, so a checkpoint is written and the edited weights are exported as those of any run.

    Args:
        roles: the roles that are read.
    """

    steps = 1

    def __init__(self, *roles: str) -> None:
        self.feed = OneStep(frozenset(roles))
        self.edited = False

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """No optimizer; forget what an earlier run measured."""
        self.prepared = self.edited = False
        self.optimizers = []
        return self.optimizers

    @abstractmethod
    def measure(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure what the edit needs and keep it; returns numbers worth logging."""

    @abstractmethod
    def edit(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Change the weights in place by what was measured, and drop that; returns scalars worth logging."""

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure on whole passes over the roles."""
        return self.measure(network, loaders) | super().prepare(network, loaders)

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """Edit the weights; the batch is not used."""
        if not self.prepared or self.edited:
            when = "came after the edit" if self.edited else "came before configure(network) and prepare(…)"
            raise RuntimeError(f"{type(self).__name__}.step {when}.")
        self.edited = True
        return self.edit(network)

    def state_dict(self) -> dict[str, Any]:
        """Whether the edit was made: what was measured before is measured anew by a resumed run."""
        return {"prepared": self.edited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.prepared = self.edited = state["prepared"]
