"""What the data-free attacks share: the layers they read, unnormalised input, and the rescaling of a saturated v."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from torchlethe.components.split_network import watch_order
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.models import Normalize
from torchlethe.updates.attacks.base import LossAttack, OptimizerFactory


def gd_optimizer(parameters: Iterable[Any]) -> Adam:
    """Adam with GD-UAP's rate, 0.1: v lies at its bounds within a few steps and is halved there."""
    return Adam(parameters, lr=0.1)


@contextmanager
def without_normalisation(network: nn.Module) -> Iterator[None]:
    """Let every :class:`~torchlethe.models.Normalize` of a network pass its input through, inside the block."""
    layers = [layer for layer in network.modules() if isinstance(layer, Normalize)]
    handles = [layer.register_forward_hook(lambda _, inputs, output: inputs[0]) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerAttack(LossAttack):
    """Base of the attacks on the activations of convolutions.

    Args:
        layers: dotted names of the layers, in forward order; by default all convolutions, and the linear layers too
            where there are fewer than two convolutions (transformers).
        raw_input: whether the network's normalisation is left out, as in the official codes.
        optimizer: makes the optimizer.
        rescale: halve v once more than half of its entries lie at ±ξ and that share has come to rest.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        raw_input: bool = True,
        optimizer: OptimizerFactory = gd_optimizer,
        rescale: bool = True,
    ) -> None:
        super().__init__(optimizer)
        self.layers, self.raw_input, self.rescale = layers, raw_input, rescale
        self._share: Tensor | None = None

    def watched(self, network: nn.Module, example: Tensor) -> list[str]:
        """The layers in forward order.

        Raises:
            ValueError: a named layer does not exist, or there is none to watch.
        """
        if self.layers is not None:
            known = dict(network.named_modules())
            if missing := [name for name in self.layers if name not in known]:
                raise ValueError(f"layers contains {missing[0]!r}, but the network has no such layer.")
            return list(self.layers)
        found = watch_order(network, example, nn.modules.conv._ConvNd)
        if len(found) < 2:
            found = watch_order(network, example, (nn.modules.conv._ConvNd, nn.Linear))
        if not found:
            raise ValueError(f"{type(network).__name__} has neither convolutions nor linear layers: name its layers.")
        return found

    def after_step(self, noise: UniversalNoise, k: int) -> None:
        """Project, and halve a v that has come to rest at its bounds; nothing waits for the device."""
        noise.project_()
        if not self.rescale:
            return
        share = noise.saturation()
        if self._share is not None:
            halve = (share > 0.5) & ((share - self._share.to(share)).abs() < 1e-5)
            with torch.no_grad():
                noise.v.mul_(torch.where(halve, 0.5, 1.0).to(noise.v))
        self._share = share

    def state_dict(self) -> dict[str, Any]:
        """The share of saturated entries after the last step."""
        return {"share": self._share}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._share = state["share"]
