"""Signed gradient steps on images within a box, in pixel units, and random crops that gradients pass through.

Symbols: x clean image, δ perturbation, ε radius, α step, x' = clamp(x + δ, 0, 255); all in units of 1/255.

Sources: HanxunH/Unlearnable-Examples, lhfowl/adversarial_poisons, fshp971/robust-unlearnable-examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradient = Callable[[Tensor, int], Tensor]


def sign_descent(
    gradient: Gradient, image: Tensor, delta: Tensor, radius: float, step: float, steps: int, low: float = 0.0
) -> Tensor:
    """Descend on a loss by signed steps: x' ← x' − α·sign(∇), δ ← clamp(x' − x, ±ε), x' ← clamp(x + δ, 0, 255).

    Args:
        gradient: gives the gradient of the loss at x' (B, C, H, W) in pixel units in step t, from 0; its scale does
            not matter.
        image: (B, C, H, W) floating, x in [0, 255].
        delta: (B, C, H, W), the first δ; it is clamped only with the first step.
        radius: ε.
        step: α; a negative one ascends.
        steps: how many steps.
        low: smallest pixel value.

    Returns:
        (B, C, H, W), the last δ in [−ε, ε]; x + δ may still leave [0, 255].

    >>> x = torch.tensor([1.0, 100.0])
    >>> sign_descent(lambda now, t: torch.tensor([1.0, -1.0]), x, torch.zeros(2), radius=2.0, step=1.5, steps=3)
    tensor([-2.,  2.])
    """
    moved = (image + delta).clamp(low, 255)
    for t in range(steps):
        delta = (moved - step * gradient(moved, t).sign() - image).clamp_(-radius, radius)
        moved = (image + delta).clamp_(low, 255)
    return delta


def quantized(image: Tensor, delta: Tensor) -> Tensor:
    """The 8-bit image x + round(δ), clamped to 0…255: it keeps an integer bound on |δ|.

    Args:
        image: (B, C, H, W) uint8.
        delta: (B, C, H, W), δ in units of 1/255.

    Returns:
        (B, C, H, W) uint8.

    >>> quantized(torch.tensor([250, 3], dtype=torch.uint8), torch.tensor([7.6, -2.4]))
    tensor([255,   1], dtype=torch.uint8)
    """
    return (image.to(torch.int16) + delta.round().to(torch.int16)).clamp_(0, 255).to(torch.uint8)


def crop_and_flip(image: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Move each image by whole pixels, filling with zeros, then mirror some: the random crop and flip of training.

    Gradients pass through exactly: the adjoint of such a move is the move back, so the backward pass is another gather,
    deterministic on every device.

    Args:
        image: (B, C, H, W) floating.
        shift: (B, 2) int64, rows and columns: result[i, j] = image[i + shift[0], j + shift[1]].
        flip: (B,) bool, which images are mirrored left to right afterwards.

    Returns:
        (B, C, H, W).

    >>> crop_and_flip(torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[0, 1]]), torch.tensor([True]))
    tensor([[[[0., 3., 2.]]]])
    """
    return _CropAndFlip.apply(image, shift, flip)


def _moved(image: Tensor, shift: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    row = torch.arange(height, device=image.device) + shift[:, :1]
    column = torch.arange(width, device=image.device) + shift[:, 1:]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None, :]
    place = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None, :]
    planes = place.flatten(1)[:, None].expand(-1, image.shape[1], -1)
    return image.flatten(2).gather(2, planes).view_as(image) * inside[:, None]


def _mirrored(image: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip[:, None, None, None], image.flip(-1), image)


class _CropAndFlip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(shift, flip)
        return _mirrored(_moved(image.contiguous(), shift), flip)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shift, flip = ctx.saved_tensors
        back = crop_and_flip(_mirrored(gradient, flip), -shift, torch.zeros_like(flip))
        return back, None, None
