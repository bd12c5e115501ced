"""SGD-UAP."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.sign_gradient import SignGradient


class SGDUAP(UniversalPerturbation):
    """SGD-UAP (SPGD): steps along the sign of the batch gradient of a bounded cross-entropy.

    Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal Adversarial Training", AAAI 2020; code
    kenny-co/sgd-uap-torch.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        target: class that all images shall get, None for an untargeted attack.
        step_size: η in units of ξ.
        beta: largest cross-entropy of an image that counts, in nats.
        labels: which classes an untargeted attack leaves: ``predicted`` (no labels needed) or ``given`` with the data.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        target: int | None = None,
        step_size: float = 0.8,
        beta: float = 12.0,
        labels: Literal["predicted", "given"] = "predicted",
        **kwargs: Any,
    ) -> None:
        super().__init__(SignGradient(target, step_size, beta, labels), network, num_classes, target=target, **kwargs)
