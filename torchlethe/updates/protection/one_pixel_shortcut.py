"""One pixel shortcut: a single pixel tells the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.functional.one_pixel import one_pixel_shortcuts, pixel_sums, with_pixel
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.settings import described


class OnePixelShortcutProtector(Protection):
    """Overwrite in all images of a class the pixel, with the colour, that stands out most from them.

    Wu et al., ICLR 2023, cychomatica/One-Pixel-Shotcut. The search reads the data once, on shares of it under DDP, and
    compares all pixels and colours by their mean and standard deviation; no network is needed.

    Args:
        num_classes: K.

    Raises:
        ValueError: ``num_classes`` is below 2.
    """

    shards = True

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_at_least(2, num_classes=num_classes)
        self.num_classes = num_classes
        self.position = self.colour = torch.zeros(0, dtype=torch.int64)

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Find the pixels; see :meth:`Protection.prepare`."""
        parts: tuple[Tensor, ...] | None = None
        for batch in data:
            found = pixel_sums(batch["image"], batch["label"], self.num_classes)
            parts = found if parts is None else tuple(a + b for a, b in zip(parts, found, strict=True))
        if parts is None:
            raise ValueError("data is empty, so there is no pixel to choose.")
        if reduce is not None:
            parts = tuple(reduce(part) for part in parts)
        self.position, self.colour = one_pixel_shortcuts(*parts)
        self.prepared = True
        return {}

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        if not self.prepared:
            raise RuntimeError("prepare() has to choose the pixels before images are protected.")
        return with_pixel(image, self.position[label], self.colour[label])

    def bound(self) -> dict[str, Any]:
        """One pixel."""
        return {"norm": "pixels", "value": 1}

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "num_classes")

    def to(self, device: torch.device | str) -> Self:
        """See :meth:`Protection.to`."""
        self.position, self.colour = self.position.to(device), self.colour.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """Position (K, 2) and colour (K, C) of each class's pixel."""
        return super().state_dict() | {"position": self.position, "colour": self.colour}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Protection.load_state_dict`."""
        super().load_state_dict(state)
        self.position, self.colour = state["position"], state["colour"]
