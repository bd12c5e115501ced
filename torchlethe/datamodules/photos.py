"""Patches of photographs: natural images that need no download, for methods that want images from elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from typing_extensions import override

from torchlethe.arguments import check_choice, check_within
from torchlethe.data.images import InMemoryImages
from torchlethe.datamodules.base import ImageDataModule, Split

_SCALES = (1, 2, 4)
_LARGEST = 192  # the narrower part of the photographs, unscaled


@lru_cache(maxsize=1)
def _photos() -> list[Tensor]:
    """The two photographs, each (3, 427, 640) float32."""
    return [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in load_sample_images().images]


class PhotoPatchesDataModule(ImageDataModule):
    """Random patches of the two photographs that are part of scikit-learn (a temple, a flower), at three scales.

    They serve as surrogate or out-of-distribution images; the label is the photograph's number. Training patches come
    from the left 70 % of the photographs, test patches from the rest.

    Args:
        image_size: Side of the patches, 1 to 192.
        channels: 3 for colour, 1 for grey (the mean of the three).
        count: Number of training patches, an even number; the test set has a quarter as many (at least 2).
        **kwargs: Arguments of :class:`ImageDataModule`. No augmentation by default.

    Raises:
        ValueError: If an argument is out of range.

    >>> data = PhotoPatchesDataModule(image_size=8, channels=1, count=100)
    >>> data.setup()
    >>> data.train_set[[0, 1]]["image"].shape, len(data.test_set)
    (torch.Size([2, 1, 8, 8]), 26)
    """

    num_classes = 2

    def __init__(self, image_size: int = 32, channels: Literal[1, 3] = 3, count: int = 5000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_within(1, _LARGEST, image_size=image_size)
        check_choice((1, 3), channels=channels)
        if count < 2 or count % 2:
            raise ValueError(f"count is {count}, but must be an even number of at least 2.")
        self.image_size, self.channels, self.count = image_size, channels, count

    @override
    def load(self, split: Split) -> InMemoryImages:
        generator = torch.Generator().manual_seed(int(split == "test"))
        each = self.count // 2 if split == "train" else -(-self.count // 8)
        patches = torch.cat([self._patches(photo, split, each, generator) for photo in _photos()])
        labels = torch.arange(2).repeat_interleave(each)
        return InMemoryImages(patches, labels, classes=["temple", "flower"])

    def _patches(self, photo: Tensor, split: Split, count: int, generator: torch.Generator) -> Tensor:
        border = photo.shape[2] - _LARGEST
        photo = photo[..., :border] if split == "train" else photo[..., border:]
        if self.channels == 1:
            photo = photo.mean(0, keepdim=True)
        scales = [scale for scale in _SCALES if self.image_size * scale <= _LARGEST]
        side, found = torch.arange(self.image_size), []
        for number, scale in enumerate(scales):
            small = F.avg_pool2d(photo, scale) if scale > 1 else photo
            share = len(range(number, count, len(scales)))
            top, left = (
                torch.randint(size - self.image_size + 1, (share, 1), generator=generator) + side
                for size in small.shape[1:]
            )
            found.append(small[:, top[:, :, None], left[:, None, :]].transpose(0, 1))
        return torch.cat(found).round().to(torch.uint8)
