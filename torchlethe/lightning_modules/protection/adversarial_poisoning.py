"""Adversarial poisoning as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from torchlethe.io import load_weights
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.adversarial_poisoning import AdversarialPoisoningProtector


class AdversarialPoisoning(ProtectionModule):
    """AP-T and AP-U: adversarial examples of one trained network, published with their clean labels.

    Fowl et al., "Adversarial Examples Make Strong Poisons", NeurIPS 2021; defaults of lhfowl/adversarial_poisons.
    ``targeted`` minimises CE(h(t(x + δ)), (y + 1) mod K), ``untargeted`` −CE(h(t(x + δ)), y), with random crops and
    flips t that gradients pass through.

    Args:
        network: a fully trained classifier, maps images in [0, 1] to logits.
        num_classes: K.
        weights: file with its weights.
        variant: ``targeted`` (AP-T, also called TAP) or ``untargeted`` (AP-U), which depends more on the start.
        radius: ε in units of 1/255.
        step: α in units of 1/255; 0.05·ε by default.
        steps: number of steps.
        restarts: attempts from other starts; each image keeps the one with the smallest loss.
        crop: largest shift of the random crops in pixels, 0 for none; 4 is made for 32 pixels.
        flip: mirror half of the images in each step.
        shift: the wrong class is (y + shift) mod K.
        seed: seed of starts, crops and flips.

    Raises:
        FileNotFoundError: ``weights`` does not exist.
        ValueError: an argument is out of range, or the weights do not fit.

    Note:
        Under DDP each rank protects its share of the images; nothing is exchanged. The network is used in eval mode,
        images are kept in float32 units of 1/255. Precision: 32-true, 64-true or bf16-mixed.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
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
        if weights is not None:
            load_weights(network, weights)
        protection = AdversarialPoisoningProtector(
            network,
            num_classes,
            variant=variant,
            radius=radius,
            step=step,
            steps=steps,
            restarts=restarts,
            crop=crop,
            flip=flip,
            shift=shift,
            seed=seed,
        )
        super().__init__(protection, cache=False)
