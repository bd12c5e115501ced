"""CF-k and EU-k: only the last k blocks and the head are trained on the remaining data, from where they are or anew.

Source: Goel et al., "Towards Adversarial Evaluations for Inexact Machine Unlearning", 2022,
https://arxiv.org/abs/2201.06640.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.components import batch_norm_in_eval
from torchlethe.components.originals import randomised_copy
from torchlethe.data import Single
from torchlethe.models.blocks import last_blocks
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory, cross_entropy, default_optimizer


class LastBlocksUpdate(LossUpdate):
    """Cross-entropy descent on the remaining data with all but the last blocks frozen; what CF-k and EU-k share.

    Frozen blocks keep their weights and BatchNorm statistics exactly.

    Args:
        optimizer: makes the optimizer from the parameters.
        blocks: number k of blocks in front of the head that are trained with it, at least 0, see
            :func:`~torchlethe.models.blocks.last_blocks`; or the names of the submodules to train.
        bn_mode: whether BatchNorm in the trained blocks uses (and updates) its statistics: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        blocks: int | list[str] = 1,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        if (isinstance(blocks, int) and blocks < 0) or blocks == []:
            raise ValueError(f"blocks is {blocks}, it must be a number of at least 0 or a list of submodule names.")
        self.blocks = blocks
        self.feed = Single("remain")
        self.trained: list[str] = []
        self._frozen: list[nn.Parameter] = []

    def freeze(self, network: nn.Module) -> None:
        """Let only the last blocks take gradients; a Trainer calls it before it wraps the network.

        Raises:
            ValueError: the network has no such blocks.
        """
        self.thaw()
        self.trained = last_blocks(network, self.blocks) if isinstance(self.blocks, int) else list(self.blocks)
        known = dict(network.named_modules())
        if missing := [name for name in self.trained if name not in known]:
            raise ValueError(f"blocks names '{missing[0]}', but the network has no such submodule.")
        free = {p for name in self.trained for p in known[name].parameters()}
        self._frozen = [p for p in network.parameters() if p.requires_grad and p not in free]
        for p in self._frozen:
            p.requires_grad_(False)

    def thaw(self) -> None:
        """Let the weights that :meth:`freeze` has frozen take gradients again."""
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """Freeze; one optimizer over what is left."""
        self.prepared = False
        self.freeze(network)
        return super().configure(network)

    @contextmanager
    def _frozen_statistics(self, network: nn.Module) -> Iterator[None]:
        inside = tuple(f"{name}." for name in self.trained)
        layers = [
            module
            for name, module in network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not f"{name}.".startswith(inside)
        ]
        with batch_norm_in_eval(nn.ModuleList(layers)), self.batch_norm(network):
            yield

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the batch."""
        with self._frozen_statistics(network):
            loss = cross_entropy(network, batch)
        return loss, {"remain_loss": loss.detach()}

    def finish(self, network: nn.Module) -> None:
        """Hand the network back with no weight frozen that was free before."""
        super().finish(network)
        self.thaw()


class CFkUpdate(LastBlocksUpdate):
    """CF-k: fine-tune the last blocks and the head, in the hope that they forget; see :class:`LastBlocksUpdate`."""


class EUkUpdate(LastBlocksUpdate):
    """EU-k: initialise the last blocks and the head anew and train them; the rest is as the forget set shaped it.

    Args:
        optimizer: makes the optimizer from the parameters.
        blocks: see :class:`LastBlocksUpdate`.
        seed: seed of the initialisation, the same on all ranks and devices.
        bn_mode: see :class:`LastBlocksUpdate`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        blocks: int | list[str] = 1,
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, blocks, bn_mode)
        self.seed = seed

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Initialise what is trained anew."""
        fresh = randomised_copy(network, self.seed)
        with torch.no_grad():
            for name in self.trained:
                network.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
        return super().prepare(network, loaders)
