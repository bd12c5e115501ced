"""GAP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.generative import GenerativePerturbation, gap_optimizer


class GAPUAP(UniversalPerturbation):
    """GAP: a generator learns the one perturbation, from a fixed random image.

    Poursaeed, Katsman, Gao, Belongie, "Generative Adversarial Perturbations", CVPR 2018. The generator is smaller than
    the published one (``width``, ``blocks``) and travels in the checkpoint.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        target: class that all images shall get, None for an untargeted attack.
        width: channels of the generator's first layer.
        blocks: its residual blocks.
        optimizer: makes the optimizer of the generator; Adam with rate 2e-4 and β₁ 0.5 by default.
        seed: of the generator.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        target: int | None = None,
        width: int = 16,
        blocks: int = 3,
        optimizer: OptimizerCallable = gap_optimizer,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        attack = GenerativePerturbation(target, width, blocks, seed, optimizer)
        super().__init__(attack, network, num_classes, target=target, seed=seed, **kwargs)
