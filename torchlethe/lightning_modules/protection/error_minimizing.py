"""Error-minimising noise as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from torchlethe.io import load_weights
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.error_minimizing import ErrorMinimizingProtector


class ErrorMinimizing(ProtectionModule):
    """EM: noise and a network minimise the loss by turns, until there seems to be nothing left to learn.

    Huang et al., "Unlearnable Examples", ICLR 2021; defaults of HanxunH/Unlearnable-Examples. ``emax`` ascends in place
    of descending, against a trained network that stays as it is.

    Args:
        network: the architecture, whose weights ``emin`` draws from the seed; for ``emax`` a trained network.
        num_classes: K.
        weights: file with the trained network's weights, for ``emax``.
        objective: ``emin`` or ``emax``.
        noise_of: noise for each ``sample``, or for each ``class``, which protects new images of the class too.
        radius: ε in units of 1/255.
        step: α in units of 1/255.
        steps: steps of the noise in a round; by default 20, for classes 1.
        train_steps: SGD steps in a round.
        rounds: rounds at most.
        stop_error: error on x + δ below which (``emax``: 1 − error) the rounds end; by default 0.01, for classes 0.1.
        share: share of the images that class noise is learned on; by default 1 for images, 0.2 for classes.
        lr: learning rate of the network's SGD.
        momentum: its momentum.
        weight_decay: its weight decay.
        clip: largest norm of the network's gradient; 0 does not clip.
        batch_size: images of a training batch.
        search_batch_size: images whose noise is searched at a time.
        seed: seed of weights and batches.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        FileNotFoundError: ``weights`` does not exist.
        ValueError: an argument is out of range, or the weights do not fit.

    Note:
        Every rank learns the same noise on all of the data, and rank 0's is used; then each rank protects its share.
        Noise exists for the images that were prepared on (for classes: for all images of the class).
        The preparation runs in float32 whatever the Trainer's precision and shows its progress on a terminal. Its
        outcome is kept, and every minute a snapshot from which a run goes on that was killed.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        objective: Literal["emin", "emax"] = "emin",
        noise_of: Literal["sample", "class"] = "sample",
        radius: int = 8,
        step: float = 0.8,
        steps: int | None = None,
        train_steps: int = 10,
        rounds: int = 100,
        stop_error: float | None = None,
        share: float | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        clip: float = 5.0,
        batch_size: int = 128,
        search_batch_size: int = 512,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        if weights is not None:
            load_weights(network, weights)
        protection = ErrorMinimizingProtector(
            network,
            num_classes,
            objective=objective,
            noise_of=noise_of,
            radius=radius,
            step=step,
            steps=steps,
            train_steps=train_steps,
            rounds=rounds,
            stop_error=stop_error,
            share=share,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            clip=clip,
            batch_size=batch_size,
            search_batch_size=search_batch_size,
            seed=seed,
        )
        super().__init__(protection, cache_dir, cache)

    @classmethod
    def needs_weights(cls, arguments: Mapping[str, Any]) -> bool:
        """Only ``emax`` does; ``emin`` draws its weights."""
        return arguments.get("objective") == "emax"
