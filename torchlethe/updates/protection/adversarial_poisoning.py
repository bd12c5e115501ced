"""Adversarial poisoning: adversarial examples of a trained network, with their clean labels."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.updates.protection.sign_descent import CrossEntropyProtector


class AdversarialPoisoningProtector(CrossEntropyProtector):
    """AP-T, also called TAP: minimise CE(h(t(x + δ)), (y + 1) mod K); AP-U: minimise −CE(h(t(x + δ)), y).

    Fowl et al., "Adversarial Examples Make Strong Poisons", NeurIPS 2021; defaults of lhfowl/adversarial_poisons.

    Args:
        network: a fully trained classifier, maps images in [0, 1] to logits.
        num_classes: K.
        variant: ``targeted`` (AP-T) or ``untargeted`` (AP-U), which depends more on the start.
        radius: ε in units of 1/255.
        step: α in units of 1/255; 0.05·ε by default.
        steps: number of steps.
        restarts: attempts, of which each image keeps the one with the smallest loss.
        crop: largest shift of the random crops t in pixels.
        flip: mirror images at random.
        shift: the wrong class is (y + shift) mod K.
        seed: seed of starts, crops and flips.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        variant: Literal["targeted", "untargeted"] = "targeted",
        radius: int = 8,
        step: float | None = None,
        steps: int = 250,
        restarts: int = 8,
        crop: int = 4,
        flip: bool = True,
        shift: int = 1,
        seed: int = 0,
    ) -> None:
        check_choice(("targeted", "untargeted"), variant=variant)
        check_at_least(2, num_classes=num_classes)
        if shift % num_classes == 0:
            raise ValueError(f"shift is {shift}, which maps each of the {num_classes} classes to itself.")
        step = 0.05 * radius if step is None else step
        super().__init__(network, radius, step, steps, "gaussian", restarts, crop, flip, seed)
        self.variant, self.num_classes, self.shift = variant, num_classes, shift
        self.sign = 1.0 if variant == "targeted" else -1.0

    def wanted(self, label: Tensor) -> Tensor:
        """The wrong class of AP-T, the own one of AP-U."""
        return (label + self.shift) % self.num_classes if self.variant == "targeted" else label

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        own = {"variant": self.variant, "num_classes": self.num_classes, "shift": self.shift}
        return super().describe() | own
