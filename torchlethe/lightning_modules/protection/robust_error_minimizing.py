"""Robust error-minimising noise as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.robust_error_minimizing import RobustErrorMinimizingProtector


class RobustErrorMinimizing(ProtectionModule):
    """REM: noise that minimises the loss of a network which is trained adversarially on it.

    Fu et al., "Robust Unlearnable Examples", ICLR 2022; defaults of fshp971/robust-unlearnable-examples. With
    ``attack_radius=0, samples=1, crop=0, flip=False`` it is that repository's way of making EM noise.

    Args:
        network: the architecture, maps images in [0, 1] to logits; it is trained from weights drawn from the seed.
        radius: ε in units of 1/255.
        step: α of the noise in units of 1/255.
        steps: steps of the noise each time.
        samples: random transforms that a step of the noise averages over.
        attack_radius: ε_a of the adversary in units of 1/255; 0 for none.
        attack_step: its step.
        attack_steps: its number of steps.
        crop: largest shift of the random crops in pixels, 0 for none; 4 is made for 32 pixels.
        flip: mirror images at random.
        train_steps: SGD steps of the network.
        perturb_every: training steps for each new noise of a batch.
        decay_every: training steps after which the learning rate is divided by 10.
        lr: learning rate of the network's SGD.
        momentum: its momentum.
        weight_decay: its weight decay.
        batch_size: images of a training batch.
        search_batch_size: images whose final noise is made at a time.
        seed: seed of weights, batches, starts, crops and flips.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Every rank learns the same noise on all of the data, and rank 0's is used; then each rank protects its share.
        Noise exists for the images that were prepared on.
        The preparation runs in float32 whatever the Trainer's precision and shows its progress on a terminal. Its
        outcome is kept, and every minute a snapshot from which a run goes on that was killed.
    """

    def __init__(
        self,
        network: nn.Module,
        radius: int = 8,
        step: float = 1.6,
        steps: int = 10,
        samples: int = 5,
        attack_radius: float = 4.0,
        attack_step: float = 0.8,
        attack_steps: int = 10,
        crop: int = 4,
        flip: bool = True,
        train_steps: int = 5000,
        perturb_every: int = 1,
        decay_every: int = 2000,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 128,
        search_batch_size: int = 512,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = RobustErrorMinimizingProtector(
            network,
            radius=radius,
            step=step,
            steps=steps,
            samples=samples,
            attack_radius=attack_radius,
            attack_step=attack_step,
            attack_steps=attack_steps,
            crop=crop,
            flip=flip,
            train_steps=train_steps,
            perturb_every=perturb_every,
            decay_every=decay_every,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            batch_size=batch_size,
            search_batch_size=search_batch_size,
            seed=seed,
        )
        super().__init__(protection, cache_dir, cache)
