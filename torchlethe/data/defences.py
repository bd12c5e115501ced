"""What an appropriator does to protected images before training: cheap operations that may wipe a perturbation out.

Each works on whole uint8 batches and depends on the image alone (no randomness), so a data set is treated once.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from torchlethe.arguments import check_above, check_within
from torchlethe.data.augmentation import Augmentation


class Defence(Augmentation):
    """Base of the defences: an augmentation that ignores seed, epoch and index.

    It serves wherever an :class:`~torchlethe.data.Augmentation` does, alone or in a :class:`Chain`, and as one of the
    ``defences`` of a :class:`~torchlethe.datamodules.ProtectedDataModule`, which applies it once.
    """

    def __init__(self) -> None:
        super().__init__(crop=0, flip=False)

    def apply(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to the same."""
        raise NotImplementedError

    @override
    def __call__(
        self, images: Tensor, index: Tensor, epoch: Tensor | int, augment: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        treated = self.apply(images)
        return (
            treated if augment is None else torch.where(augment.to(images.device)[:, None, None, None], treated, images)
        )


class Grayscale(Defence):
    """Grey images with as many channels as before (ITU-R 601-2 luma, as torchvision and PIL).

    >>> Grayscale().apply(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)).unique().tolist()
    [7]
    """

    def __repr__(self) -> str:
        return "Grayscale()"

    @override
    def apply(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            return images
        # on bytes torchvision rounds down, which would darken every image by a level
        return F.rgb_to_grayscale(images.float(), num_output_channels=3).round().to(torch.uint8)


class BitDepth(Defence):
    """Keep the highest bits of each value (posterize).

    Args:
        bits: bits to keep, 1 to 8.

    >>> BitDepth(2).apply(torch.tensor([[[[0, 63, 64, 255]]]], dtype=torch.uint8)).flatten().tolist()
    [0, 0, 64, 192]
    """

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        check_within(1, 8, bits=bits)
        self.bits = bits

    def __repr__(self) -> str:
        return f"BitDepth(bits={self.bits})"

    @override
    def apply(self, images: Tensor) -> Tensor:
        return F.posterize(images, self.bits)


class Blur(Defence):
    """Gaussian blur.

    Args:
        kernel_size: side of the kernel in pixels, odd.
        sigma: standard deviation in pixels.
    """

    def __init__(self, kernel_size: int = 3, sigma: float = 0.1) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, but must be odd and positive.")
        check_above(0, sigma=sigma)
        self.kernel_size, self.sigma = kernel_size, sigma

    def __repr__(self) -> str:
        return f"Blur(kernel_size={self.kernel_size}, sigma={self.sigma})"

    @override
    def apply(self, images: Tensor) -> Tensor:
        return F.gaussian_blur(images, [self.kernel_size] * 2, [self.sigma] * 2)


class JPEG(Defence):
    """Save as JPEG and read again, by PIL's codec (on the CPU, in threads).

    Args:
        quality: 1 (smallest file) to 95, PIL's scale.
    """

    def __init__(self, quality: int = 10) -> None:
        super().__init__()
        check_within(1, 95, quality=quality)
        self.quality = quality

    def __repr__(self) -> str:
        return f"JPEG(quality={self.quality})"

    @override
    def apply(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"the images have {images.shape[1]} channels, but JPEG holds 1 or 3.")
        rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the codec leaves the interpreter lock
            coded = np.stack(list(pool.map(self._code, rows)))
        return torch.from_numpy(coded).permute(0, 3, 1, 2).contiguous().to(images.device)

    def _code(self, image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=self.quality)
        with Image.open(buffer) as found:
            return np.asarray(found).reshape(image.shape)


class Chain(Augmentation):
    """Several augmentations, one after the other; the seed of each is its own.

    Args:
        steps: the augmentations, in order.

    >>> chain = Chain([Grayscale(), Augmentation(crop=1)])
    >>> chain(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), 0).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, steps: list[Augmentation]) -> None:
        super().__init__(crop=0, flip=False)
        if not steps:
            raise ValueError("steps is empty, but a chain needs at least one augmentation.")
        self.steps = list(steps)

    def __repr__(self) -> str:
        return f"Chain({self.steps})"

    @override
    def __call__(
        self, images: Tensor, index: Tensor, epoch: Tensor | int, augment: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        for number, step in enumerate(self.steps):
            images = step(images, index, epoch, augment, seed + number * 0x5851F42D4C957F2D)
        return images
