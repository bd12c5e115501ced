"""Scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from typing_extensions import override

from torchlethe.arguments import check_choice
from torchlethe.data.images import InMemoryImages
from torchlethe.data.splits import stratified
from torchlethe.datamodules.base import ImageDataModule, Split


@lru_cache(maxsize=2)
def _digits(image_size: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    if image_size != images.shape[-1]:
        scaled = F.interpolate(images.float(), (image_size, image_size), mode="bilinear", antialias=True)
        images = scaled.round().clamp(0, 255).to(torch.uint8)
    return images, torch.from_numpy(digits.target).to(torch.int64)


class DigitsDataModule(ImageDataModule):
    """1797 handwritten digits of 8×8 pixels in 10 classes, part of scikit-learn (UCI "Optical Recognition of Digits").

    The division into 1200 training and 597 test images is stratified and always the same.

    Args:
        image_size: 8 as stored, or 32 (enlarged once, bilinear), for networks made for CIFAR.
        channels: 1 for grey, 3 for three equal channels.
        test_size: Number of test images.
        **kwargs: Arguments of :class:`ImageDataModule`. No augmentation by default.

    >>> data = DigitsDataModule(batch_size=64)
    >>> data.setup()
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch["image"].shape, len(data.test_set)
    (torch.Size([64, 1, 8, 8]), 597)
    """

    num_classes = 10

    def __init__(
        self, image_size: Literal[8, 32] = 8, channels: Literal[1, 3] = 1, test_size: int = 597, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_choice((8, 32), image_size=image_size)
        check_choice((1, 3), channels=channels)
        if not 0 < test_size < 1797:
            raise ValueError(f"test_size is {test_size}, but must lie between 1 and 1796.")
        self.image_size, self.channels, self.test_size = image_size, channels, test_size

    @override
    def load(self, split: Split) -> InMemoryImages:
        images, labels = _digits(self.image_size)
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        chosen[stratified(labels, self.test_size, seed=0)] = True
        chosen = chosen if split == "test" else ~chosen
        return InMemoryImages(images[chosen].repeat(1, self.channels, 1, 1), labels[chosen])
