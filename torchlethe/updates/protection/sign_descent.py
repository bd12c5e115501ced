"""Protections that take signed gradient steps against one frozen network, image by image."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.components import gradients_on
from torchlethe.components.batch_norm_folding import Pairs, foldable_pairs, folded_network, folded_weights
from torchlethe.data.hashing import mix_seed, random_normal
from torchlethe.functional.sign_descent import quantized, sign_descent
from torchlethe.updates.protection.base import Protection
from torchlethe.updates.protection.draws import random_crops, uniform_noise
from torchlethe.updates.protection.frozen import frozen
from torchlethe.updates.protection.settings import check_radius, check_step, described


class SignDescentProtector(Protection):
    """Minimise a loss of a trained network by signed steps within a box of pixel values; nothing to prepare.

    δ is a float32 number of 1/255 for each pixel value whatever the network's precision, and is rounded at the end. The
    network is used in eval mode. All randomness is a function of (seed, restart, step, index).

    Args:
        network: maps images in [0, 1] to logits.
        radius: ε, whole number in units of 1/255.
        step: α in units of 1/255.
        steps: number of steps.
        init: start at the clean image (``zero``), at N(0, ε²) clamped to ±ε (``gaussian``), or uniformly (``uniform``).
        restarts: how often to start anew; each image keeps the attempt with the smallest loss of the 8-bit result.
        crop: largest shift in pixels of the random crop that each step sees the images in; 0 for none.
        flip: mirror half of the images in each step.
        seed: seed of starts, crops and flips.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        radius: int,
        step: float,
        steps: int,
        init: Literal["zero", "gaussian", "uniform"] = "zero",
        restarts: int = 1,
        crop: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, steps=steps, restarts=restarts)
        check_at_least(0, crop=crop)
        check_choice(("zero", "gaussian", "uniform"), init=init)
        self.radius: int = check_radius(radius)
        self.step, self.steps, self.init, self.restarts = check_step(step), steps, init, restarts
        self.crop, self.flip, self.seed = crop, flip, seed
        self.networks = {"network": network}

    @abstractmethod
    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """What each image minimises.

        Args:
            image: (B, C, H, W) in [0, 1].
            label: (B,).

        Returns:
            (B,).
        """

    def reader(self) -> nn.Module:
        """What computes the logits."""
        return self.networks["network"]

    def logits(self, image: Tensor) -> Tensor:
        """The network's logits for images in [0, 1], in float32 or better."""
        logits = self.reader()(image.to(self._weights_dtype()))
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def state(self) -> AbstractContextManager[None]:
        """In which state the network is asked for gradients."""
        return frozen(self.networks["network"])

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`; ``notes`` has the loss of each image."""
        with gradients_on(), self.state():
            image, label, index = image.clone(), label.clone(), index.clone()
            result, least = image, torch.full((len(image),), torch.inf, device=image.device)
            for restart in range(self.restarts):
                found, loss = self._attempt(image, label, index, restart)
                better = loss < least
                result = torch.where(better[:, None, None, None], found, result)
                least = torch.where(better, loss, least)
        self.notes = {"crafting_loss": least}
        return result

    def _attempt(self, image: Tensor, label: Tensor, index: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        seed = mix_seed(self.seed, restart)
        pixels = image.to(self._dtype())

        def gradient(now: Tensor, t: int) -> Tensor:
            now = now.detach().requires_grad_()
            seen = self._augmented(now, index, seed, t)
            (found,) = torch.autograd.grad(self.loss(seen / 255, label).sum(), now)
            return found

        delta = sign_descent(gradient, pixels, self._start(pixels, index, seed), self.radius, self.step, self.steps)
        result = quantized(image, delta)
        loss = self.loss(result.to(pixels.dtype) / 255, label)
        return result, loss.detach().float()

    def _weights_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.networks["network"].parameters()), torch.float32)

    def _dtype(self) -> torch.dtype:
        return torch.float64 if self._weights_dtype() is torch.float64 else torch.float32

    def _start(self, pixels: Tensor, index: Tensor, seed: int) -> Tensor:
        shape = tuple(pixels.shape[1:])
        if self.init == "zero":
            return torch.zeros_like(pixels)
        if self.init == "gaussian":
            noise = random_normal(seed, 0, index, shape)
            return (noise * self.radius).clamp_(-self.radius, self.radius).to(pixels.dtype)
        return uniform_noise(seed, index, shape, self.radius).to(pixels.dtype)

    def _augmented(self, image: Tensor, index: Tensor, seed: int, t: int) -> Tensor:
        if not (self.crop or self.flip):
            return image
        return random_crops(image, index, mix_seed(seed, t + 1), self.crop, self.flip)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "step", "steps", "init", "restarts", "crop", "flip", "seed")


class CrossEntropyProtector(SignDescentProtector):
    """Cross-entropy to a class that a subclass chooses; BatchNorm is folded, which changes nothing but rounding."""

    sign = 1.0
    _pairs: Pairs | None = None
    _folded: nn.Module | None = None

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`SignDescentProtector.protect`."""
        network = self.networks["network"]
        with torch.inference_mode(False), torch.no_grad():
            if self._pairs is None:
                self._pairs = foldable_pairs(network, image[:2].to(self._weights_dtype()) / 255)
            # anew for each batch, as the network may have moved or been trained
            self._folded = folded_network(network, self._pairs)
            self._folded.load_state_dict(folded_weights(network, self._pairs), strict=False)
        try:
            return super().protect(image, label, index)
        finally:
            self._folded = None

    def reader(self) -> nn.Module:
        """The network with BatchNorm folded, while images are protected."""
        return self._folded if self._folded is not None else super().reader()

    def wanted(self, label: Tensor) -> Tensor:
        """The class whose cross-entropy is minimised."""
        return label

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """±CE(h(x), wanted(y)) of each image."""
        return self.sign * F.cross_entropy(self.logits(image), self.wanted(label), reduction="none")
