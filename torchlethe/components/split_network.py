"""Logits and features of any classifier from one pass: the input of a layer is read on the way."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: (B, K), in the network's precision.
        features: (B, d), the input of the feature layer, flattened.
        activations: outputs of the watched layers in forward order.
    """

    logits: Tensor
    features: Tensor | None
    activations: list[Tensor]


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returned: a tensor, or an object of transformers that has ``logits``."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network returned {shape}, it must return logits of shape (batch, classes).")
    return logits


def find_feature_layer(network: nn.Module, example: Tensor, name: str | None = None) -> str:
    """The layer whose input counts as the feature: the one named, else the last Linear that a pass reaches.

    Args:
        network: a classifier in eval mode.
        example: (1, C, H, W), an image to try.
        name: dotted name of any module of the network.

    Returns:
        The dotted name.

    Raises:
        ValueError: no layer has that name, or a pass reaches no Linear.
    """
    names = dict(network.named_modules())
    if name is not None:
        if name not in names or not name:
            close = difflib.get_close_matches(name, [key for key in names if key], n=3, cutoff=0.3)
            close += [key for key, layer in names.items() if isinstance(layer, nn.Linear) and key not in close][-1:]
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see network.named_modules()."
            raise ValueError(f"feature_layer is {name!r}, but the network has no such layer: {hint}")
        return name
    reached = watch_order(network, example, nn.Linear)
    if not reached:
        raise ValueError(
            f"no Linear layer is reached in {type(network).__name__}: name the layer in front of which the features "
            "are, with feature_layer."
        )
    return reached[-1]


def watch_order(network: nn.Module, example: Tensor, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """Names of the modules of a kind in the order in which a pass reaches them, each once.

    Args:
        network: a classifier in eval mode.
        example: (1, C, H, W).
        kind: their class.
    """
    found: dict[str, None] = {}

    def hook(name: str) -> Any:
        return lambda *_: found.setdefault(name)

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in network.named_modules() if isinstance(m, kind)]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


class SplitNetwork:
    """A frozen classifier that also tells its features.

    No module of its own: it holds the network without registering it, and takes the features by a hook that stays until
    :meth:`close`.

    Args:
        network: maps images to logits; its eval mode is checked at each call.
        feature_layer: dotted name of the layer whose input is the feature, None where features are not needed.
        watched: names of layers whose outputs are wanted.

    Raises:
        ValueError: a layer does not exist.
    """

    def __init__(self, network: nn.Module, feature_layer: str | None = None, watched: Sequence[str] = ()) -> None:
        self.network, self.feature_layer = network, feature_layer
        self._feature: list[Tensor] = []
        self._activations: list[Tensor] = []
        self._handles: list[Any] = []
        if feature_layer is not None:
            layer = network.get_submodule(feature_layer)
            self._handles.append(layer.register_forward_pre_hook(self._take_feature))
        for name in watched:
            self._handles.append(network.get_submodule(name).register_forward_hook(self._take_activation))

    def _take_feature(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # a layer that works in place would overwrite what it was given
        self._feature.append(inputs[0].clone() if getattr(layer, "inplace", False) else inputs[0])

    def _take_activation(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._activations.append(output.clone())  # a ReLU in place may follow

    def __call__(self, image: Tensor) -> Outputs:
        """Pass images through.

        Args:
            image: (B, C, H, W) in [0, 1].

        Raises:
            RuntimeError: the network is in train mode.
        """
        if self.network.training:
            raise RuntimeError("the network is in train mode, an attack needs it as it predicts: call network.eval().")
        self._feature.clear()
        self._activations.clear()
        logits = logits_of(self.network(image))
        feature = self._feature[-1].flatten(1) if self._feature else None
        activations = list(self._activations)
        self._feature.clear()  # nothing may keep the graph alive
        self._activations.clear()
        return Outputs(logits, feature, activations)

    def head_weight(self) -> Tensor | None:
        """(K, d) weight of the feature layer, None where that is no Linear."""
        layer = self.network.get_submodule(self.feature_layer) if self.feature_layer else None
        return layer.weight.detach() if isinstance(layer, nn.Linear) else None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
