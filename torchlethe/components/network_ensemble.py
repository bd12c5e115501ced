"""Many weights for one architecture, run one after the other or as one vectorised model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from torchlethe.components.batch_norm_folding import Pairs, foldable_pairs, folded_network, folded_weights

Read = Callable[[nn.Module, Tensor], Any]
Fill = Callable[[nn.Module], Any]


class NetworkEnsemble:
    """N frozen networks in eval mode that differ in their weights only.

    Weights are not held: each is read (by its ``fill``) when it is asked for, so that memory does not grow with N;
    unless they are asked to stay on the device. No parameter takes gradients, and the network that was handed over is
    left alone.

    Args:
        network: the architecture; copied.
        fills: for each of the N, what puts its weights into a copy of ``network``: a callable, or a state dict.
        read: what a pass gives, of (network, image); the network's output by default.
        resident: keep all weights on the device after they were first read.
        compiled: compile the pass with ``torch.compile``: one graph serves all weights. A network or ``read`` that does
            not fit into one graph fails, as it would be compiled anew for each network.

    Attributes:
        pairs: the convolutions and BatchNorms that are folded, see :meth:`fold`.
    """

    def __init__(
        self,
        network: nn.Module,
        fills: Sequence[Fill | Mapping[str, Tensor]],
        read: Read | None = None,
        resident: bool = False,
        compiled: bool = False,
    ) -> None:
        self.fills = list(fills)
        self.read = read or (lambda part, image: part(image))
        self.resident = resident
        self.holder = copy.deepcopy(network).eval().requires_grad_(False)
        self.pairs: Pairs = []
        self.skeleton = _Pass(folded_network(self.holder, self.pairs), self.read)
        self.compiled: Any = torch.compile(self._pass, fullgraph=True) if compiled else None
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._stacked: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.fills)

    def fold(self, image: Tensor) -> None:
        """Let each convolution carry the BatchNorm behind it, where the network is built so; exact in eval mode.

        Args:
            image: (B, C, H, W) in [0, 1], to find out where.
        """
        self.pairs = foldable_pairs(self.holder, image)
        self.skeleton.network = folded_network(self.holder, self.pairs)
        self._kept, self._stacked = {}, None

    @property
    def dtype(self) -> torch.dtype:
        """In which the networks compute (without autocast)."""
        return next((p.dtype for p in self.holder.parameters()), torch.get_default_dtype())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device or dtype, as ``nn.Module.to``; weights that were read are read anew."""
        self.holder.to(*args, **kwargs)
        self.skeleton.to(*args, **kwargs)
        self._kept, self._stacked = {}, None
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for p in self.holder.parameters()), torch.device("cpu"))

    def weights(self, k: int) -> dict[str, Tensor]:
        """The k-th network's tensors, folded, for :meth:`run`; valid until another one is asked for."""
        if k in self._kept:
            return self._kept[k]
        fill = self.fills[k]
        if callable(fill):
            fill(self.holder)
        else:
            self.holder.load_state_dict(fill)
        tensors = folded_weights(self.holder, self.pairs)
        if self.resident:
            # what is not folded belongs to the holder, which the next network overwrites
            self._kept[k] = tensors = {name: value.clone() for name, value in tensors.items()}
        return tensors

    def run(self, weights: Mapping[str, Tensor], image: Tensor) -> Any:
        """One network's pass: what ``read`` gives for images (B, C, H, W) in [0, 1]."""
        return (self.compiled or self._pass)(weights, image)

    def __call__(self, k: int, image: Tensor) -> Any:
        """The k-th network's pass."""
        return self.run(self.weights(k), image)

    def all(self, image: Tensor, each: bool = False) -> Any:
        """The passes of all networks as one, each output with a leading dimension of N; keeps all weights in memory.

        Args:
            image: (B, C, H, W) for all networks, or with ``each`` (N, B, C, H, W).
            each: whether every network has its own images.
        """
        if self._stacked is None:
            states = [{name: value.clone() for name, value in self.weights(k).items()} for k in range(len(self))]
            self._stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        return vmap(self._pass, in_dims=(0, 0 if each else None))(self._stacked, image)

    def _pass(self, weights: Mapping[str, Tensor], image: Tensor) -> Any:
        return functional_call(self.skeleton, {f"network.{name}": value for name, value in weights.items()}, (image,))


class _Pass(nn.Module):
    """A network whose ``forward`` is what shall be read of it."""

    def __init__(self, network: nn.Module, read: Read) -> None:
        super().__init__()
        self.network = network
        self.read = read

    def forward(self, image: Tensor) -> Any:
        return self.read(self.network, image)
