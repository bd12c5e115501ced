"""TensorClog: images that leave a network little to learn from, as the gradient of its weights vanishes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.functional.gradient_norm import squared_gradient_norms
from torchlethe.functional.mean_loss import differentiable_twice
from torchlethe.updates.protection.sign_descent import SignDescentProtector


class TensorClogProtector(SignDescentProtector):
    """Minimise ‖∇_θ CE(h_θ(t(x + δ)), y)‖₂ of each image over all weights, or maximise it.

    Shen et al., IEEE Access 2019, in the form of lhfowl/adversarial_poisons, which takes the norm for a whole batch;
    for each image by itself the result does not depend on the batch. The steps follow the square, which has the same
    signs.

    Args:
        network: a trained classifier, maps images in [0, 1] to logits.
        variant: ``clog`` makes the gradient vanish, ``explode`` makes it large.
        radius: ε in units of 1/255.
        step: α in units of 1/255; 0.05·ε by default.
        steps: number of steps.
        restarts: attempts, of which each image keeps the one with the smallest loss.
        crop: largest shift of the random crops t in pixels.
        flip: mirror images at random.
        at_once: images whose weight gradients are in memory at a time.
        seed: seed of starts, crops and flips.

    Raises:
        ValueError: an argument is out of range, the weights are of half precision, or the network has an operation
            that cannot be differentiated twice for each image.
    """

    def __init__(
        self,
        network: nn.Module,
        variant: Literal["clog", "explode"] = "clog",
        radius: int = 8,
        step: float | None = None,
        steps: int = 250,
        restarts: int = 1,
        crop: int = 4,
        flip: bool = True,
        at_once: int = 64,
        seed: int = 0,
    ) -> None:
        check_choice(("clog", "explode"), variant=variant)
        check_at_least(1, at_once=at_once)
        step = 0.05 * radius if step is None else step
        super().__init__(network, radius, step, steps, "gaussian", restarts, crop, flip, seed)
        self.variant, self.at_once = variant, at_once
        if not any(p.requires_grad for p in network.parameters()):
            raise ValueError("the network has no parameter that requires a gradient, so there is none to clog.")

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        network = self.networks["network"]
        low = next((p.dtype for p in network.parameters() if p.dtype not in (torch.float32, torch.float64)), None)
        if low is not None:
            raise ValueError(
                f"the weights are {str(low).removeprefix('torch.')}, TensorClog needs float32 or float64 weights: "
                "second derivatives do not survive half precision."
            )
        parts = []
        for rows in torch.arange(len(image), device=image.device).split(self.at_once):
            parts.append((super().protect(image[rows], label[rows], index[rows]), self.notes["crafting_loss"]))
        self.notes = {"crafting_loss": torch.cat([loss for _, loss in parts])}
        return torch.cat([found for found, _ in parts])

    def state(self) -> AbstractContextManager[None]:
        """Differentiable twice, with respect to the weights and the image."""
        return differentiable_twice(self.networks["network"])

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """±‖∇_θ CE‖₂² of each image."""
        try:
            norms = squared_gradient_norms(self.networks["network"], image, label)
            if image.requires_grad and not norms.requires_grad:
                raise RuntimeError("the weights' gradient is a constant of the images")
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the network, a {type(self.networks['network']).__name__}, cannot be differentiated twice for each "
                f"image, as TensorClog needs: {str(error).splitlines()[0]}"
            ) from error
        return norms if self.variant == "clog" else -norms

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`; how many images are worked on at once changes nothing."""
        return super().describe() | {"variant": self.variant}
