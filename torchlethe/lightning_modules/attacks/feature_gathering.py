"""FG-UAP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.base import default_optimizer
from torchlethe.updates.attacks.feature_gathering import FeatureGathering


class FeatureGatheringUAP(UniversalPerturbation):
    """FG-UAP: gather the features of all images around that of the perturbation itself; needs no labels.

    Minimises mean cos(φ(x+v), φ(x)), φ the input of the last linear layer, where neural collapse happens; with a target
    also λ·CE with it. Ye, Cheng, Huang, "FG-UAP: Feature-Gathering Universal Adversarial Perturbation", 2022, arXiv
    2209.13113; official code yzx1213/FG-UAP.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        target: class that all images shall get, None for an untargeted attack.
        lam: λ, weight of the cross-entropy of a targeted attack.
        optimizer: makes the optimizer of v; Adam with rate 0.02 and weight decay 1e-5 by default.
        **kwargs: of :class:`UniversalPerturbation`.

    Example:
        >>> from torchlethe.models import MLP
        >>> module = FeatureGatheringUAP(MLP(), num_classes=10, xi=0.25, image_shape=[1, 8, 8])
        >>> module.build([1, 8, 8])
        >>> module.noise
        UniversalNoise(1×8×8, xi=0.25, p=inf, clamp=True)
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        target: int | None = None,
        lam: float = 0.1,
        optimizer: OptimizerCallable = default_optimizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(FeatureGathering(target, lam, optimizer), network, num_classes, target=target, **kwargs)
