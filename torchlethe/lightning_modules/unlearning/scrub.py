"""SCRUB and SCRUB+R."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import SCRUBUpdate
from torchlethe.updates.scrub import scrub_optimizer


class SCRUB(UnlearningModule):
    """Drive the network away from the original on the forget set, keep it close elsewhere (Kurmanji et al., 2023).

    Each of the first ``msteps`` epochs begins with a pass over the forget set that raises the divergence from the
    original network; every epoch has a pass over the remaining data that lowers it, beside the cross-entropy. The
    defaults are the official ones for large networks (https://github.com/meghdadk/SCRUB).

    Args:
        network: the trained classifier, see :class:`~torchlethe.lightning_modules.unlearning.base.UnlearningModule`.
        num_classes: number of classes.
        weights: file with the original model's weights.
        epochs: number of epochs.
        msteps: number of epochs with a pass over the forget set, at most ``epochs``.
        gamma: weight of the cross-entropy on the remaining data, at least 0.
        alpha: weight of the divergence on the remaining data, at least 0.
        temperature: of the divergences, above 0.
        optimizer: makes the optimizer from the parameters.
        lr_schedule: the learning rate over epochs: ``constant``, ``cosine``, or ``milestones``.
        milestones: epochs, counted from 1, after which the rate is multiplied by ``lr_factor``.
        lr_factor: see ``milestones``.
        rewind: SCRUB+R: end with the weights of the epoch whose error on the forget set comes closest to the final
            error on validation data of the same classes; the datamodule must set such data apart.
        bn_mode: whose statistics BatchNorm uses and gathers: those of every batch (``train``), of none (``eval``), or
            of remaining batches only (``remain``).
        forget_batch_size: samples of a forget batch and process; None takes the datamodule's batch size. Official for
            large networks: 32 beside 128. Needs an UnlearningDataModule.
        cache_teacher: ask the original once for each sample in place of once a step; the same numbers, for training
            without augmentation, else refused.

    Raises:
        ValueError: an argument is out of range, or the precision is fp16.

    Note:
        Manual optimization; the run ends by itself after all passes, which are one epoch of the Trainer. The original
        is a frozen copy outside the checkpoint: a resumed run must start from the same weights, and says so when it
        does not. Under DDP divergences are means over ranks of equally large batches.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        epochs: int = 3,
        msteps: int = 2,
        gamma: float = 0.99,
        alpha: float = 0.001,
        temperature: float = 4.0,
        optimizer: OptimizerCallable = scrub_optimizer,
        lr_schedule: Literal["constant", "cosine", "milestones"] = "constant",
        milestones: list[int] | None = None,
        lr_factor: float = 0.1,
        rewind: bool = False,
        bn_mode: Literal["train", "eval", "remain"] = "train",
        forget_batch_size: int | None = None,
        cache_teacher: bool = False,
    ) -> None:
        update = SCRUBUpdate(
            epochs=epochs,
            msteps=msteps,
            gamma=gamma,
            alpha=alpha,
            temperature=temperature,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            milestones=milestones or (),
            lr_factor=lr_factor,
            rewind=rewind,
            bn_mode=bn_mode,
            forget_batch_size=forget_batch_size,
            cache_teacher=cache_teacher,
        )
        super().__init__(network, num_classes, update, weights)
