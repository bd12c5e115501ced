"""The perturbation v of an attack: where it starts, the ball it stays in, the version that did best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_choice
from torchlethe.functional.universal import perturbed, project

Init = Literal["uniform", "sign", "zero"]


def check_ball(xi: float, p: float) -> None:
    """Refuse a radius or a norm that makes no sense for images in [0, 1].

    Args:
        xi: the radius; at most 1 for p = ∞.
        p: the norm, at least 1.

    Raises:
        ValueError: out of range.
    """
    if not p >= 1:
        raise ValueError(f"p is {p}, it must be at least 1 (.inf in YAML for the largest entry).")
    if not xi > 0 or (math.isinf(p) and xi > 1) or not math.isfinite(xi):
        allowed = "lie in (0, 1], for example 10/255 = 0.0392" if math.isinf(p) else "be a positive number"
        raise ValueError(f"xi is {xi}, for images in [0, 1] and p = {p} it must {allowed}.")


class UniversalNoise(nn.Module):
    """One perturbation for all images, ‖v‖_p ≤ ξ.

    Args:
        shape: (C, H, W) of the images.
        xi: radius in pixel units.
        p: the norm, ``inf`` by default.
        clamp: whether perturbed images are clamped to [0, 1].
        init: ``uniform`` in ±ξ/2 (the default; any p is projected afterwards), ``sign`` for ±ξ, ``zero``.
        seed: of the start, which is the same on every rank and device.
        dtype: float32, or float64 for comparisons.

    Attributes:
        v: (1, C, H, W), the parameter that is learned.
        best: (1, C, H, W), the version that did best on a selection split, valid where ``best_score`` is not −1.
        best_score: its score in [0, 1]; −1 before any.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP the parameter is equal on all ranks, from the same seed and the same averaged gradient.
    """

    best: Tensor
    best_score: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        xi: float,
        p: float = math.inf,
        clamp: bool = True,
        init: Init = "uniform",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_ball(xi, p)
        check_choice(("uniform", "sign", "zero"), init=init)
        self.xi, self.p, self.clamp = xi, p, clamp
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        start = {"uniform": (uniform - 0.5) * xi, "sign": (uniform - 0.5).sign() * xi, "zero": uniform * 0}[init]
        self.v = nn.Parameter(project(start.to(dtype), xi, p))
        self.register_buffer("best", torch.zeros_like(self.v.detach()))
        self.register_buffer("best_score", torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, image: Tensor, v: Tensor | None = None) -> Tensor:
        """Perturb images.

        Args:
            image: (B, C, H, W) in [0, 1].
            v: another perturbation than the current one.

        Returns:
            (B, C, H, W) in at least float32.

        Raises:
            ValueError: the images have another size.
        """
        v = self.v if v is None else v
        if image.shape[1:] != v.shape[1:]:
            raise ValueError(f"images are {_size(image)}, but the perturbation was made for {_size(v)}.")
        return perturbed(image, v, self.clamp)

    @torch.no_grad()
    def project_(self) -> None:
        """Bring v back into its ball, in place."""
        self.v.copy_(project(self.v, self.xi, self.p))

    @torch.no_grad()
    def assign_(self, v: Tensor) -> None:
        """Replace v, for example by one from a file.

        Raises:
            ValueError: it has another shape or does not fit into the ball.
        """
        v = v.reshape(1, *v.shape[-3:]) if v.ndim in (3, 4) else v
        if v.shape != self.v.shape:
            raise ValueError(f"the perturbation is {_size(v)}, but the images are {_size(self.v)}.")
        norm = float(torch.linalg.vector_norm(v.double(), self.p))
        if not norm <= self.xi * (1 + 1e-6):
            raise ValueError(f"the perturbation has the norm {norm:.6g}, which exceeds xi = {self.xi:.6g}.")
        self.v.copy_(v)
        self.project_()
        self.best_score.fill_(-1.0)

    @torch.no_grad()
    def keep_if_better_(self, score: float) -> bool:
        """Remember the current v if its score is strictly the highest so far; returns whether it was."""
        if not score > float(self.best_score):
            return False
        self.best.copy_(self.v)
        self.best_score.fill_(score)
        return True

    @property
    def chosen(self) -> Tensor:
        """The version that did best on the selection split, the last one where there was no selection; detached."""
        return self.best if float(self.best_score) >= 0 else self.v.detach()

    @torch.no_grad()
    def saturation(self) -> Tensor:
        """The share of entries at ±ξ, a scalar on the device."""
        return (self.v.abs() >= self.xi * (1 - 1e-6)).float().mean()

    def extra_repr(self) -> str:
        """Size and ball in ``repr``."""
        return f"{_size(self.v)}, xi={self.xi:.6g}, p={self.p}, clamp={self.clamp}"


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape[1:]))
