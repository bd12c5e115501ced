"""DF-UAP."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.margin import MarginAttack, df_optimizer


class DFUAP(UniversalPerturbation):
    """DF-UAP: margin losses between logits; works on proxy images of another data set.

    Zhang, Benz, Imtiaz, Kweon, "Understanding Adversarial Examples from the Mutual Influence of Images and
    Perturbations", CVPR 2020; official code phibenz/uap_virtual_data.pytorch.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        target: class that all images shall get, None for an untargeted attack.
        kappa: κ ≥ 0, how far beyond the border the loss still falls.
        kind: ``bounded_neg`` untargeted; ``bounded_fixed_ref``, ``bounded`` or ``logit`` targeted; by default the first
            or the second.
        labels: which classes an untargeted attack leaves: ``predicted`` (no labels needed) or ``given`` with the data.
        optimizer: makes the optimizer of v; Adam with rate 0.005 by default.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        target: int | None = None,
        kappa: float = 10.0,
        kind: Literal["bounded", "bounded_fixed_ref", "bounded_neg", "logit"] | None = None,
        labels: Literal["predicted", "given"] = "predicted",
        optimizer: OptimizerCallable = df_optimizer,
        **kwargs: Any,
    ) -> None:
        attack = MarginAttack(target, kappa, kind, labels, optimizer)
        super().__init__(attack, network, num_classes, target=target, **kwargs)
