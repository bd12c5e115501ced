"""DeepConfuse as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.deep_confuse import DeepConfuseProtector


class DeepConfuse(ProtectionModule):
    """A generator of perturbations, trained so that a classifier trained on its images is bad on clean ones.

    After Feng et al., "Learning to Confuse", NeurIPS 2019. All settings are ours: the published code has trained
    generators only.

    Args:
        network: the architecture of the classifier, trained anew in each round from weights drawn from the seed.
        generator: maps images in [0, 1] to values in [−1, 1] of their shape, image by image; a small autoencoder by
            default.
        in_channels: channels of the default generator.
        radius: ε in units of 1/255.
        rounds: how often a classifier is trained.
        steps: SGD steps of a round.
        lr: learning rate of the classifier's plain SGD.
        generator_lr: learning rate of the generator's Adam.
        batch_size: images of a training batch.
        seed: seed of weights and batches.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        ValueError: an argument is out of range, or the network has no second derivative.

    Note:
        Every rank trains the same generator on all of the data, and rank 0's is used; then each rank protects its
        share. New images can be protected too. The preparation runs in float32 whatever the Trainer's precision and
        shows its progress on a terminal. Its outcome is kept, and every minute a snapshot from which a run goes on that
        was killed.
    """

    def __init__(
        self,
        network: nn.Module,
        generator: nn.Module | None = None,
        in_channels: int = 3,
        radius: int = 8,
        rounds: int = 20,
        steps: int = 200,
        lr: float = 0.05,
        generator_lr: float = 1e-3,
        batch_size: int = 128,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = DeepConfuseProtector(
            network,
            generator=generator,
            in_channels=in_channels,
            radius=radius,
            rounds=rounds,
            steps=steps,
            lr=lr,
            generator_lr=generator_lr,
            batch_size=batch_size,
            seed=seed,
        )
        super().__init__(protection, cache_dir, cache)
