"""One pixel shortcut as a LightningModule."""

from __future__ import annotations

from pathlib import Path

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.one_pixel_shortcut import OnePixelShortcutProtector


class OnePixelShortcut(ProtectionModule):
    """OPS: overwrite in all images of a class the one pixel, with the corner colour, that stands out most; no network.

    Wu et al., "One-Pixel Shortcut", ICLR 2023; the search of cychomatica/One-Pixel-Shotcut.

    Args:
        num_classes: K.
        cache_dir: folder for the outcome of the preparation, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep it.

    Raises:
        ValueError: ``num_classes`` is below 2, or there are more classes than pixels and colours.

    Note:
        Under DDP sums over pixels are taken on shares of the data and added up; each rank protects its share.
    """

    def __init__(
        self,
        num_classes: int,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = OnePixelShortcutProtector(
            num_classes,
        )
        super().__init__(protection, cache_dir, cache)
