"""TensorClog as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from torchlethe.io import load_weights
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.tensor_clog import TensorClogProtector


class TensorClog(ProtectionModule):
    """Minimise ‖∇_θ CE(h_θ(t(x + δ)), y)‖₂ of each image, so that it teaches nothing; or maximise it.

    Shen et al., IEEE Access 2019, in the form of lhfowl/adversarial_poisons, for each image by itself.

    Args:
        network: a trained classifier, maps images in [0, 1] to logits.
        weights: file with its weights.
        variant: ``clog``, or ``explode`` for its negative.
        radius: ε in units of 1/255.
        step: α in units of 1/255; 0.05·ε by default.
        steps: number of steps.
        restarts: attempts from other starts; each image keeps the one with the smallest loss.
        crop: largest shift of the random crops t in pixels, 0 for none.
        flip: mirror half of the images in each step.
        at_once: images whose weight gradients are in memory at a time: ``at_once`` times the size of the network.
        seed: seed of starts, crops and flips.

    Raises:
        FileNotFoundError: ``weights`` does not exist.
        ValueError: an argument is out of range, the weights do not fit or are of half precision, or the network has an
            operation that cannot be differentiated twice for each image.

    Note:
        Under DDP each rank protects its share of the images; nothing is exchanged. Gradients of gradients run in the
        precision of the weights (float32 or float64), also under bf16-mixed, and without compiled or fused kernels.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None = None,
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
        if weights is not None:
            load_weights(network, weights)
        protection = TensorClogProtector(
            network,
            variant=variant,
            radius=radius,
            step=step,
            steps=steps,
            restarts=restarts,
            crop=crop,
            flip=flip,
            at_once=at_once,
            seed=seed,
        )
        super().__init__(protection, cache=False)
