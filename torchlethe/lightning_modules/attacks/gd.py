"""GD-UAP and its forerunner FFF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.layer_activations import gd_optimizer
from torchlethe.updates.attacks.layer_saturation import LayerSaturation


class GDUAP(UniversalPerturbation):
    """GD-UAP: v alone, as an image, drives every convolution as hard as it can; a batch is a step, images are unread.

    Mopuri, Ganeshan, Babu, "Generalizable Data-free Objective for Crafting Universal Adversarial Perturbations", TPAMI
    2018; ``kind: mean`` is Fast Feature Fool (FFF), BMVC 2017. The published patience is Lightning's ``EarlyStopping``
    on ``val_fooling_ratio``.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        kind: ``norm`` for GD-UAP, ``mean`` for FFF.
        layers: dotted names of the layers; all convolutions by default.
        raw_input: whether the network's normalisation is left out, as in the official code.
        optimizer: makes the optimizer of v; Adam with rate 0.1 by default.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        kind: Literal["norm", "mean"] = "norm",
        layers: Sequence[str] | None = None,
        raw_input: bool = True,
        optimizer: OptimizerCallable = gd_optimizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(LayerSaturation(kind, layers, raw_input, optimizer), network, num_classes, **kwargs)
