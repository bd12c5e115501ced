"""Finding the same image in two data sets by its content."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlethe.data.hashing import generator_for
from torchlethe.data.images import ImageDataset, InMemoryImages


def content_hashes(images: Tensor, chunk: int = 2048) -> Tensor:
    """A number for each image that is equal for equal images and, but for one pair in 2^57, differs for others.

    A sum of the pixels with random 64-bit factors, modulo 2^64 (multiply-shift hashing, Dietzfelbinger et al. 1997).

    Args:
        images: (N, …) uint8.
        chunk: images that are widened to 64 bits at once.

    Returns:
        (N,) int64; equal on every machine.

    >>> first, _, third = content_hashes(torch.tensor([[1, 2], [2, 1], [1, 2]], dtype=torch.uint8)).tolist()
    >>> first == third
    True
    """
    flat = images.flatten(1)
    generator = generator_for("content hash")
    factors = torch.randint(-(2**63), 2**63 - 1, (flat.shape[1],), generator=generator) | 1
    factors = factors.to(flat.device)
    return torch.cat([(part.long() * factors).sum(1) for part in flat.split(chunk)])


def shared_images(first: ImageDataset, second: ImageDataset) -> Tensor:
    """Positions in the first data set of images that the second one has too, whatever their labels and indices.

    Args:
        first: a data set in memory; for another one nothing is read and nothing found.
        second: likewise.

    Returns:
        (M,) int64, ascending.

    >>> images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    >>> shared_images(InMemoryImages(images, [0, 1, 2]), InMemoryImages(images[1:], [0, 0])).tolist()
    [1, 2]
    """
    if not isinstance(first, InMemoryImages) or not isinstance(second, InMemoryImages):
        return torch.zeros(0, dtype=torch.long)
    if first.store.shape[1:] != second.store.shape[1:]:
        return torch.zeros(0, dtype=torch.long)
    return torch.isin(_hashes(first), _hashes(second)).nonzero().flatten()


def _hashes(dataset: InMemoryImages) -> Tensor:
    # by parts, so that a large store is not copied as a whole
    return torch.cat([content_hashes(dataset.read(rows)).cpu() for rows in dataset.rows.split(2048)])
