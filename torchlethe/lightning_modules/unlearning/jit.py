"""JiT: smooth the network around the forget samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import JiTUpdate
from torchlethe.updates.jit import jit_optimizer


class JiT(UnlearningModule):
    """Lipschitz regularisation on the forget set only (Foster et al., 2024); reads no remaining data and no labels.

    Each step lowers the mean of ‖f(x) − f(x + ξ)‖ / ‖ξ‖ over noisy copies of the forget images, f being the logits.
    Defaults of https://github.com/pedroandreou/supreme-unlearning: one epoch.

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        draws: noisy copies of each image in a step, at least 1.
        sigma: standard deviation of the noise, in units of pixels in [0, 1].
        seed: seed of the noise.
        bn_mode: ``eval``: BatchNorm keeps its running statistics; ``train``: it uses (and gathers) those of the clean
            and noisy forget batches.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. Under DDP two ranks with
        half the batch compute what one computes, but for BatchNorm in train mode.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = jit_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        draws: int = 10,
        sigma: float = 0.1,
        seed: int = 0,
        bn_mode: Literal["train", "eval"] = "eval",
    ) -> None:
        update = JiTUpdate(optimizer, draws=draws, sigma=sigma, seed=seed, bn_mode=bn_mode)
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
