"""Autoregressive perturbations as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.autoregressive import AutoregressiveProtector


class Autoregressive(ProtectionModule):
    """AR: add a pattern whose pixels follow a linear rule that belongs to the class, scaled to L2 norm 1; no network.

    Sandoval-Segura et al., NeurIPS 2022; defaults of psandovalsegura/autoregressive-poisoning.

    Args:
        num_classes: K.
        norm: Euclidean norm of each perturbation, for pixels in [0, 1], before rounding.
        crop: rows and columns of the pattern's start that are left out.
        min_response: smallest response of the filters of other classes to a class's pattern, by which kernels are
            accepted; 10 is made for 32 pixels, and responses grow with the width of the images.
        max_norm: largest norm of a trial pattern before it is scaled.
        seed: seed of kernels and patterns.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        ValueError: an argument is out of range, or not enough kernels could be found.

    Note:
        Every rank finds the same kernels, and each protects its share of the images. Patterns are made in float64.
    """

    def __init__(
        self,
        num_classes: int,
        norm: float = 1.0,
        crop: int = 4,
        min_response: float = 10.0,
        max_norm: float = 50.0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = AutoregressiveProtector(
            num_classes,
            norm=norm,
            crop=crop,
            min_response=min_response,
            max_norm=max_norm,
            seed=seed,
        )
        super().__init__(protection, cache_dir, cache)
