"""NAG."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.updates.attacks.generative import PerturbationDistribution, nag_optimizer


class NAGUAP(UniversalPerturbation):
    """NAG: a generator of many perturbations that fool and differ; one of them is judged.

    Mopuri, Ojha, Garg, Babu, "NAG: Network for Adversary Generation", CVPR 2018. The generator is smaller than the
    published one and travels in the checkpoint.

    Args:
        network: the classifier, maps images in [0, 1] to logits.
        num_classes: number of classes.
        diversity: weight of the diversity loss.
        latent: length of the generator's input.
        width: channels of the generator's widest layer.
        optimizer: makes the optimizer of the generator; Adam with rate 1e-3 by default.
        seed: of the generator and the vectors of each step.
        **kwargs: of :class:`UniversalPerturbation`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        diversity: float = 1.0,
        latent: int = 10,
        width: int = 64,
        optimizer: OptimizerCallable = nag_optimizer,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        attack = PerturbationDistribution(diversity, latent, width, seed, optimizer)
        super().__init__(attack, network, num_classes, seed=seed, **kwargs)
