"""Cos-UAP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.base import default_optimizer
from torchlethe.updates.attacks.cosine_logits import CosineLogits


class CosineUAP(UniversalPerturbation):
    """Cos-UAP: turn the logits of all images away from those of the clean ones; data-free with jigsaw images.

    Zhang, Benz, Karjauv, Kweon, "Data-free Universal Adversarial Perturbation and Black-box Attack", ICCV 2021.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        target: class that all images shall get (by cross-entropy), None for an untargeted attack.
        optimizer: makes the optimizer of v; Adam with rate 0.02 by default.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        target: int | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(CosineLogits(target, optimizer), network, num_classes, target=target, **kwargs)
