"""GD-UAP and Fast Feature Fool: v alone shall drive every layer as hard as it can; no images at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import layer_saturation_loss
from torchlethe.updates.attacks.base import OptimizerFactory
from torchlethe.updates.attacks.layer_activations import LayerAttack, gd_optimizer, without_normalisation


class LayerSaturation(LayerAttack):
    """Minimise −Σ_l log(½‖a_l(v)‖²) over the layers; images are never looked at, a batch is a step.

    Mopuri, Ganeshan, Babu, "Generalizable Data-free Objective for Crafting Universal Adversarial Perturbations", TPAMI
    2018 (``norm``); Mopuri, Garg, Babu, "Fast Feature Fool", BMVC 2017 (``mean``);
    github.com/psandovalsegura/pytorch-gd-uap.

    Args:
        kind: ``norm`` for GD-UAP, ``mean`` for FFF.
        layers: see :class:`LayerAttack`.
        raw_input: see :class:`LayerAttack`.
        optimizer: makes the optimizer.

    Raises:
        ValueError: ``kind`` is unknown.
    """

    def __init__(
        self,
        kind: Literal["norm", "mean"] = "norm",
        layers: Sequence[str] | None = None,
        raw_input: bool = True,
        optimizer: OptimizerFactory = gd_optimizer,
    ) -> None:
        check_choice(("norm", "mean"), kind=kind)
        super().__init__(layers, raw_input, optimizer)
        self.kind = kind

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of v as an image; its negative entries are kept."""
        with without_normalisation(network.network) if self.raw_input else nullcontext():
            activations = network(noise.v).activations
        return layer_saturation_loss(activations, self.kind), {}
