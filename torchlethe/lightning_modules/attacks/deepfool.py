"""The DeepFool-type universal perturbation."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.deepfool import DeepFoolAttack


class DeepFoolUAP(UniversalPerturbation):
    """The first universal perturbation: the smallest step across the border, image after image, projected each time.

    Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017. Images are taken one
    after the other, so it runs on one device and is slow; the number of passes is the Trainer's ``max_epochs``.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        classes: how many of the most probable classes DeepFool looks at.
        overshoot: how far beyond the border a step goes, as a share of its length.
        max_iterations: of DeepFool for one image.
        init: where v starts, ``zero`` as published.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        classes: int = 10,
        overshoot: float = 0.02,
        max_iterations: int = 50,
        init: Literal["uniform", "sign", "zero"] = "zero",
        **kwargs: Any,
    ) -> None:
        attack = DeepFoolAttack(classes, overshoot, max_iterations)
        super().__init__(attack, network, num_classes, init=init, **kwargs)
