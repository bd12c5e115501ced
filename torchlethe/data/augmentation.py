"""Augmentation of whole batches on their device; the randomness is a hash of (seed, epoch, index)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlethe.arguments import check_within
from torchlethe.data.hashing import random_bits


class Augmentation:
    """Random crop, horizontal flip, RandAugment and cutout of uint8 batches, in this order.

    Each sample's randomness depends on (seed, epoch, index) only, so that any batch split, number of ranks and resume
    point gives the same image. Crop, flip and cutout are a few tensor operations for the whole batch; RandAugment
    (torchvision v2) goes image by image and is some fifty times slower.

    Args:
        crop: Pixels of zero padding on each side before a crop back to the size; 0 for none.
        flip: Mirror half of the images left to right.
        cutout: Side in pixels of a square set to 0, centred at any pixel and clipped at the border (DeVries and
            Taylor, 2017); 0 for none.
        cutout_probability: Share of the images that get it.
        cutout_value: What the square is filled with, in [0, 1]: a number or one a channel. The data set's mean stands
            for a fill of 0 after normalisation, as most CIFAR code has it.
        rand_augment: Operations of RandAugment per image (Cubuk et al., 2020); 0 for none.
        magnitude: Strength of these operations, 0 to 30.

    Raises:
        ValueError: If a number is negative.

    >>> images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)
    >>> augment = Augmentation(crop=1)
    >>> epoch, index = torch.zeros(2, dtype=torch.int64), torch.tensor([10, 11])
    >>> both, second = augment(images, index, epoch), augment(images[1:], index[1:], epoch[1:])
    >>> torch.equal(both[1:], second)
    True
    """

    def __init__(
        self,
        crop: int = 4,
        flip: bool = True,
        cutout: int = 0,
        rand_augment: int = 0,
        magnitude: int = 9,
        cutout_probability: float = 1.0,
        cutout_value: float | list[float] = 0.0,
    ) -> None:
        for name, value in (("crop", crop), ("cutout", cutout), ("rand_augment", rand_augment)):
            if value < 0:
                raise ValueError(f"{name} is {value}, but must be 0 (off) or positive.")
        check_within(0, 30, magnitude=magnitude)
        check_within(0, 1, cutout_probability=cutout_probability)
        self.cutout_value = [cutout_value] if isinstance(cutout_value, int | float) else list(cutout_value)
        if not all(0 <= value <= 1 for value in self.cutout_value):
            raise ValueError(f"cutout_value is {cutout_value}, but pixels lie in [0, 1].")
        self.crop, self.flip, self.cutout, self.cutout_probability = crop, flip, cutout, cutout_probability
        self.rand_augment, self.magnitude = rand_augment, magnitude
        self._policy: Any = None

    def __repr__(self) -> str:
        return (
            f"Augmentation(crop={self.crop}, flip={self.flip}, cutout={self.cutout}, "
            f"rand_augment={self.rand_augment}, magnitude={self.magnitude})"
        )

    def __call__(
        self, images: Tensor, index: Tensor, epoch: Tensor | int, augment: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) uint8.
            index: (B,) int64, identity of each sample.
            epoch: (B,) int64, the pass in which each sample is drawn; or one number for all.
            augment: (B,) bool, False where a sample stays as it is; all are augmented by default.
            seed: Augmentation seed.

        Returns:
            (B, C, H, W) uint8, on the device of ``images``.
        """
        # two numbers for the crop, one for the flip, one for RandAugment, two or three for cutout: what is needed
        streams = (6 + (self.cutout_probability < 1)) if self.cutout else 4 if self.rand_augment else 3
        bits = random_bits(seed, epoch, index, streams).to(images.device)
        on = torch.ones_like(bits[:, 0], dtype=torch.bool) if augment is None else augment.to(images.device)
        images = self._crop_and_flip(images, bits, on)
        if self.rand_augment:
            images = self._rand_augment(images, bits[:, 3], on)
        return self._cut_out(images, bits, on) if self.cutout else images

    def _crop_and_flip(self, images: Tensor, bits: Tensor, on: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        if self.crop:
            # Every row of every window is a run of `width` bytes of the padded batch: one index_select copies them all.
            padded = F.pad(images, (self.crop,) * 4).contiguous()  # it may be channels_last
            tall, wide = padded.shape[-2:]
            shift = torch.where(on[:, None], bits[:, :2] % (2 * self.crop + 1), self.crop)
            corner = (
                torch.arange(batch, device=images.device) * (channels * tall * wide) + shift[:, 0] * wide + shift[:, 1]
            )
            plane = torch.arange(channels, device=images.device)[:, None] * (tall * wide)
            row = (plane + torch.arange(height, device=images.device) * wide).flatten()
            runs = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
            images = runs.index_select(0, (corner[:, None] + row).flatten()).view(images.shape)
        if self.flip:
            # Choosing from both versions by index is four times as fast on CPU as `where` with a broadcast mask.
            mirrored = on & (bits[:, 2] >= 1 << 31)
            choice = torch.arange(batch, device=images.device) + batch * mirrored
            images = torch.cat([images, images.flip(-1)]).index_select(0, choice)
        return images

    def _cut_out(self, images: Tensor, bits: Tensor, on: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.cutout_probability < 1:
            on = on & (bits[:, 6] < self.cutout_probability * 2**32)

        def hidden(size: int, draw: Tensor) -> Tensor:
            start = draw % size - self.cutout // 2
            place = torch.arange(size, device=images.device)
            return (place >= start[:, None]) & (place < start[:, None] + self.cutout) & on[:, None]

        box = (hidden(height, bits[:, 4])[:, :, None] & hidden(width, bits[:, 5])[:, None, :])[:, None]
        if not any(self.cutout_value):
            return images * ~box
        if len(self.cutout_value) not in (1, images.shape[1]):
            raise ValueError(
                f"cutout_value has {len(self.cutout_value)} numbers, but the images have {images.shape[1]} channels."
            )
        fill = [round(255 * value) for value in self.cutout_value]
        return torch.where(box, torch.tensor(fill, dtype=images.dtype, device=images.device)[:, None, None], images)

    def _rand_augment(self, images: Tensor, draws: Tensor, on: Tensor) -> Tensor:
        if self._policy is None:
            from torchvision.transforms import v2

            self._policy = v2.RandAugment(num_ops=self.rand_augment, magnitude=self.magnitude)
        # torchvision draws from the global CPU generator: give it each sample's own seed, and the caller's state back.
        generator = torch.default_generator
        state = generator.get_state()
        images = images.clone()
        for position, (draw, augment) in enumerate(zip(draws.tolist(), on.tolist(), strict=True)):
            if augment:
                generator.manual_seed(draw)
                images[position] = self._policy(images[position])
        generator.set_state(state)
        return images
