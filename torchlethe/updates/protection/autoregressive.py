"""Autoregressive perturbations: noise whose pixels follow a linear rule that belongs to the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from torchlethe.arguments import check_above, check_at_least
from torchlethe.data.hashing import generator_for, random_normal
from torchlethe.functional.autoregressive import ORDER, autoregressive_pattern, find_kernels, l2_scaled
from torchlethe.functional.sign_descent import quantized
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.settings import described

_MEMORY = 1 << 26  # bytes that the row filters of the images worked on at once may take


class AutoregressiveProtector(Protection):
    """Add to each image a pattern of its class's autoregressive process, scaled to a Euclidean norm; no network.

    Sandoval-Segura et al., NeurIPS 2022, psandovalsegura/autoregressive-poisoning. The kernels are drawn for the size
    of the images, in double precision; each image's pattern is a function of (seed, index) and its class.

    Args:
        num_classes: K.
        norm: Euclidean norm of each perturbation, for pixels in [0, 1], before rounding.
        crop: rows and columns of the pattern's start that are left out.
        min_response: smallest response of the filters of other classes to a class's pattern. It grows with the width of
            the images: 10 is made for 32 pixels.
        max_norm: largest norm of a trial pattern before it is scaled.
        seed: seed of kernels and patterns.

    Raises:
        ValueError: an argument is out of range; in :meth:`prepare`, not enough kernels could be found.
    """

    def __init__(
        self,
        num_classes: int,
        norm: float = 1.0,
        crop: int = 4,
        min_response: float = 10.0,
        max_norm: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(2, num_classes=num_classes)
        check_at_least(0, crop=crop, min_response=min_response)
        check_above(0, norm=norm, max_norm=max_norm)
        self.num_classes, self.norm, self.crop = num_classes, float(norm), crop
        self.min_response, self.max_norm, self.seed = float(min_response), float(max_norm), seed
        self.kernels = torch.zeros(0, dtype=torch.float64)
        self.size: list[int] = []

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Find a kernel for each class and channel; of the data only the images' shape is read."""
        batch = next(iter(data), None)
        if batch is None:
            raise ValueError("data is empty, so the size of the images is not known.")
        channels, height, width = batch["image"].shape[1:]
        self.kernels = find_kernels(
            self.num_classes,
            channels,
            (height, width),
            generator_for("autoregressive kernels", self.seed),
            crop=self.crop,
            max_norm=self.max_norm,
            min_response=self.min_response,
        ).to(device)
        self.size = [channels, height, width]
        self.prepared = True
        return {}

    def perturbation(self, label: Tensor, index: Tensor) -> Tensor:
        """The perturbations δ of images, (B, C, H, W) float64 in units of the [0, 1] range."""
        channels, height, width = self.size[0], self.size[1] + self.crop, self.size[2] + self.crop
        start = torch.zeros(len(label), channels, height, width, dtype=torch.float64, device=label.device)
        # only the first rows and columns of the start matter, so only they are drawn
        top, side = ORDER * width, ORDER * (height - ORDER)
        drawn = random_normal(self.seed, 0, index, (channels, top + side)).double()
        start[:, :, :ORDER] = drawn[..., :top].unflatten(-1, (ORDER, width))
        start[:, :, ORDER:, :ORDER] = drawn[..., top:].unflatten(-1, (height - ORDER, ORDER))
        at_once = max(1, _MEMORY // (8 * channels * (width - ORDER) ** 2))
        rows = torch.arange(len(label), device=label.device).split(at_once)
        patterns = [autoregressive_pattern(self.kernels, label[part], start[part]) for part in rows]
        return l2_scaled(torch.cat(patterns), self.norm, self.crop)[0]

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        if not self.prepared:
            raise RuntimeError("prepare() has to find the kernels before images are protected.")
        if list(image.shape[1:]) != self.size:
            raise ValueError(f"image is {tuple(image.shape[1:])}, the kernels were made for {tuple(self.size)}.")
        return quantized(image, 255 * self.perturbation(label, index))

    def bound(self) -> dict[str, Any]:
        """The Euclidean norm before rounding."""
        return {"norm": "2", "value": self.norm}

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "num_classes", "norm", "crop", "min_response", "max_norm", "seed")

    def to(self, device: torch.device | str) -> Self:
        """See :meth:`Protection.to`."""
        self.kernels = self.kernels.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """The kernels (K, C, 3, 3), and the images' shape that they are for."""
        return super().state_dict() | {"kernels": self.kernels, "size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Protection.load_state_dict`."""
        super().load_state_dict(state)
        self.kernels, self.size = state["kernels"], list(state["size"])
