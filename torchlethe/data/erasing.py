"""The strong augmentations of UEraser: plasma brightness and contrast, channel shuffle and TrivialAugment.

Source: Qin, Gao, Zhao, Ye and Xu, "Learning the unlearnable: adversarial augmentations suppress unlearnable example
attacks", 2023 (lafeat/ueraser).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlethe.arguments import check_within
from torchlethe.data.hashing import mix_seed, random_bits


def plasma(seed: int, epoch: Tensor | int, index: Tensor, size: tuple[int, int], roughness: Tensor) -> Tensor:
    """Plasma fractals by midpoint displacement: each octave doubles the grid and adds noise scaled by the roughness.

    Args:
        seed: any integer.
        epoch: (B,) int64, or one number for all.
        index: (B,) int64, the identity of a sample; with seed and epoch it decides the fractal.
        size: height and width.
        roughness: (B,) in (0, 1): how fast the noise fades from octave to octave.

    Returns:
        (B, 1, H, W) float32 in [0, 1], touching both ends; on the device of ``index``.

    Example:
        >>> found = plasma(0, 0, torch.arange(2), (8, 8), torch.tensor([0.2, 0.6]))
        >>> found.shape, float(found.min()), float(found.max())
        (torch.Size([2, 1, 8, 8]), 0.0, 1.0)
    """
    levels = max(1, (max(size) - 1).bit_length())
    field = torch.zeros(len(index), 1, 2, 2, device=index.device)
    scale = torch.ones(len(index), 1, 1, 1, device=index.device)
    for level in range(levels + 1):
        side = 2**level + 1
        field = F.interpolate(field, (side, side), mode="bilinear", align_corners=True)
        bits = random_bits(mix_seed(seed, level), epoch, index, side * side)
        field = field + scale * (bits.float() * 2**-31 - 1).view(-1, 1, side, side)
        scale = scale * roughness.to(index.device).view(-1, 1, 1, 1)
    field = field[..., : size[0], : size[1]]
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low).clamp_min(1e-12)


class ErasingAugmentation:
    """A strong view of each image: plasma brightness, plasma contrast, channel shuffle, then TrivialAugment.

    Each of the first three happens with ``probability``. The randomness of each image is a function of (seed, epoch,
    index). Plasma and shuffle are a few operations for the batch; TrivialAugment (torchvision v2) goes image by image.

    Args:
        roughness: range of the plasma's roughness.
        intensity: range of the strength of plasma brightness.
        probability: of plasma brightness, plasma contrast and the channel shuffle.
        trivial: whether TrivialAugment (Müller and Hutter, ICCV 2021) follows.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> ErasingAugmentation(trivial=False)(images, torch.arange(2), 0, 0).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        roughness: tuple[float, float] = (0.1, 0.7),
        intensity: tuple[float, float] = (0.0, 1.0),
        probability: float = 0.5,
        trivial: bool = True,
    ) -> None:
        if not 0 < roughness[0] <= roughness[1] < 1:
            raise ValueError(f"roughness is {roughness}, but must be a range in (0, 1).")
        if not 0 <= intensity[0] <= intensity[1] <= 1:
            raise ValueError(f"intensity is {intensity}, but must be a range in [0, 1].")
        check_within(0, 1, probability=probability)
        self.roughness, self.intensity, self.probability, self.trivial = roughness, intensity, probability, trivial
        self._policy: Any = None

    def __call__(self, images: Tensor, index: Tensor, epoch: Tensor | int, seed: int) -> Tensor:
        """Draw a view of each image.

        Args:
            images: (B, C, H, W) floating in [0, 1].
            index: (B,) int64, identity of each sample.
            epoch: (B,) int64, or one number for all: with seed and index it decides the view.
            seed: any integer.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        index = index.to(images.device)
        bits = random_bits(seed, epoch, index, 7 + images.shape[1])
        unit = bits.float() / 2**32
        brightness, contrast, shuffle = (unit[:, i] < self.probability for i in range(3))

        def between(low: float, high: float, draw: Tensor) -> Tensor:
            return low + (high - low) * draw

        size = (images.shape[-2], images.shape[-1])
        rough = between(*self.roughness, unit[:, 3])
        strength = between(*self.intensity, unit[:, 4])[:, None, None, None]
        lighter = images + strength * (plasma(mix_seed(seed, 1), epoch, index, size, rough) - 0.5) * 2
        images = torch.where(brightness[:, None, None, None], lighter.clamp(0, 1), images)
        factor = 4 * plasma(mix_seed(seed, 2), epoch, index, size, between(*self.roughness, unit[:, 5]))
        images = torch.where(contrast[:, None, None, None], ((images - 0.5) * factor + 0.5).clamp(0, 1), images)
        order = torch.where(
            shuffle[:, None], bits[:, 7:].argsort(1), torch.arange(images.shape[1], device=images.device)
        )
        images = images.gather(1, order[:, :, None, None].expand_as(images))
        return self._trivial(images, bits[:, 6]) if self.trivial else images

    def _trivial(self, images: Tensor, draws: Tensor) -> Tensor:
        if self._policy is None:
            from torchvision.transforms import v2

            self._policy = v2.TrivialAugmentWide()
        # torchvision draws from the global CPU generator: give it each sample's own seed, and the caller's state back
        generator = torch.default_generator
        state = generator.get_state()
        views = (images * 255).round().to(torch.uint8)
        try:
            for position, draw in enumerate(draws.tolist()):
                generator.manual_seed(draw)
                views[position] = self._policy(views[position])
        finally:
            generator.set_state(state)
        return views.to(images.dtype) / 255
