"""One pixel shortcut: for each class the pixel and the colour that stand out most from the class's images.

Source: Wu et al., ICLR 2023, cychomatica/One-Pixel-Shotcut.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def pixel_sums(image: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the search needs to know of some images; sums over batches and ranks add up, exactly.

    Args:
        image: (B, C, H, W) uint8.
        label: (B,) int64.
        classes: K.

    Returns:
        The numbers of images (K,), sums of pixels (K, C, H, W) and sums of their squares (K, C, H, W), int64.
    """
    wide = image.to(torch.int64)
    shape = (classes, *image.shape[1:])
    count = torch.bincount(label, minlength=classes)
    total = torch.zeros(shape, dtype=torch.int64, device=image.device).index_add_(0, label, wide)
    squares = torch.zeros(shape, dtype=torch.int64, device=image.device).index_add_(0, label, wide.square())
    return count, total, squares


def one_pixel_shortcuts(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """For each class the (pixel, corner colour) with the largest mean/std of |colour − pixel| over its images.

    Mean and standard deviation go over images and channels together. As |1 − p| = 1 − p and |0 − p| = p, both follow
    from the sums, so that all places and colours are compared without going through the images again. A pair that an
    earlier class has taken is left out; so are classes without images, which get the pair that is left.

    Args:
        count: (K,), see :func:`pixel_sums`.
        total: (K, C, H, W).
        squares: (K, C, H, W).

    Returns:
        Rows and columns (K, 2), and colours (K, C) in {0, 1}; int64.

    Raises:
        ValueError: there are more classes than pairs.
    """
    classes, channels, height, width = total.shape
    colours = torch.tensor(list(itertools.product((0, 1), repeat=channels)), device=total.device)
    if classes > len(colours) * height * width:
        raise ValueError(
            f"there are {classes} classes, but images of {height}×{width} pixels and {channels} channels have only "
            f"{len(colours) * height * width} pairs of a pixel and a colour."
        )
    n = count.clamp_min(1).double()[:, None, None, None]
    p, p2 = total / (255 * n), squares / (255**2 * n)
    # (K, colours, H, W): mean over channels of |colour − p| and of its square
    white = colours.double()
    first = torch.einsum("kchw,oc->kohw", 1 - p, white) + torch.einsum("kchw,oc->kohw", p, 1 - white)
    second = torch.einsum("kchw,oc->kohw", 1 - 2 * p + p2, white) + torch.einsum("kchw,oc->kohw", p2, 1 - white)
    mean, second = first / channels, second / channels
    # rounding leaves about 1e-16 of a variance that is 0
    spread = (second - mean.square()).clamp_min(1e-12).sqrt()
    score = (mean / spread).flatten(1).cpu()
    chosen: list[int] = []
    for row in score:
        row[chosen] = -1
        chosen.append(int(row.argmax()))
    place = torch.tensor(chosen, device=total.device)
    pixel = place % (height * width)
    return torch.stack([pixel // width, pixel % width], 1), colours[place // (height * width)]


def with_pixel(image: Tensor, position: Tensor, colour: Tensor) -> Tensor:
    """Overwrite one pixel of each image.

    Args:
        image: (B, C, H, W) uint8.
        position: (B, 2) row and column.
        colour: (B, C) in {0, 1}.

    Returns:
        (B, C, H, W) uint8, a new tensor.
    """
    result = image.clone()
    result[torch.arange(len(image), device=image.device), :, position[:, 0], position[:, 1]] = (255 * colour).to(
        image.dtype
    )
    return result
