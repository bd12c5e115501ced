"""Synthetic shortcuts (LSP) as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.synthetic_shortcut import SyntheticShortcutProtector


class SyntheticShortcut(ProtectionModule):
    """LSP: add linearly separable blocks of colour, drawn from one normal cluster for each class; no network.

    Yu et al., "Availability Attacks Create Shortcuts", KDD 2022; defaults of
    dayu11/Availability-Attacks-Create-Shortcuts.

    Args:
        num_classes: K, at most 2 to the power of the number of blocks and channels.
        radius: ε of the norm ε·√d in units of 1/255; single pixels have no bound.
        patch: side of the blocks in pixels; 8 is made for 32 pixels.
        separation: distance of the clusters, ``class_sep`` of scikit-learn's ``make_classification``.
        seed: seed of the samples.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        ValueError: an argument is out of range, or the images have too few blocks for the classes.

    Note:
        Every rank draws the same samples for all images that are prepared on; then each rank protects its share.
    """

    def __init__(
        self,
        num_classes: int,
        radius: float = 6.0,
        patch: int = 8,
        separation: float = 10.0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = SyntheticShortcutProtector(
            num_classes,
            radius=radius,
            patch=patch,
            separation=separation,
            seed=seed,
        )
        super().__init__(protection, cache_dir, cache)
