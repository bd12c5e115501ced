"""SCAR: forget features go to the nearest other class, surrogate images stand for the remaining ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import SCARUpdate
from torchlethe.updates.scar import ForgetAndSurrogate, scar_optimizer


class SCAR(UnlearningModule):
    """SCAR (Bonato et al.): forget by statistics of features, keep by surrogate images.

    No step sees a remaining image: the outputs are kept on surrogate images from elsewhere. It is not free of remaining
    data, though: the classes' statistics, that forget features are drawn to, come from one pass over it at the start.
    See :class:`~torchlethe.updates.SCARUpdate`; code https://github.com/jbonato1/SCAR.

    Args:
        network: the trained classifier, with a linear head, maps images ``(B, C, H, W)`` in [0, 1] to logits.
        num_classes: number of classes.
        surrogate: a datamodule whose training images stand for the remaining ones; its labels are not looked at. They
            have the size of the data's images and are augmented like these. Any images from elsewhere will do:
            ``PhotoPatchesDataModule`` needs no download. With plain loaders by role leave it out and give
            ``{"forget": …, "remain": …, "surrogate": …}``.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from all parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        forget_weight: λ₁, weight of the distance of forget features to the nearest other class.
        retain_weight: λ₂, weight of the divergence on surrogate images; 0.1 to 5 in the official code.
        temperature: of that divergence; 1 to 2 in the official code.
        power: exponent of Tukey's transform of the features, in (0, 1].
        gamma1: shrinkage of the covariances towards the mean variance.
        gamma2: shrinkage towards the mean covariance.
        stop_accuracy: the run ends when a pass over the forget set, from the second on, finds an accuracy below it; 0
            never ends it. For whole classes; a network that forgets a random subset rightly never comes there.
        bn_mode: ``eval``: BatchNorm keeps its running statistics; ``train``: it uses (and gathers) those of forget and
            surrogate batches.

    Raises:
        ValueError: an argument is out of range, or there are no surrogate images.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer. An epoch is a pass over
        the longer of forget set and surrogate images. Under DDP two ranks with half the batch compute what one
        computes, but for BatchNorm in train mode.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        surrogate: LightningDataModule | None = None,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = scar_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        forget_weight: float = 1.0,
        retain_weight: float = 5.0,
        temperature: float = 1.0,
        power: float = 0.5,
        gamma1: float = 3.0,
        gamma2: float = 3.0,
        stop_accuracy: float = 0.01,
        bn_mode: Literal["train", "eval"] = "eval",
    ) -> None:
        update = SCARUpdate(
            optimizer=optimizer,
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            temperature=temperature,
            power=power,
            gamma1=gamma1,
            gamma2=gamma2,
            stop_accuracy=stop_accuracy,
            bn_mode=bn_mode,
        )
        super().__init__(network, num_classes, update, weights, lr_scheduler, lr_interval)
        self.surrogate = surrogate

    def prepare_data(self) -> None:
        """Download the surrogate images, if their datamodule does."""
        if self.surrogate is not None:
            self.surrogate.prepare_data()

    def setup(self, stage: str) -> None:
        """Check network and data, and load the surrogate images."""
        super().setup(stage)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not hasattr(datamodule, "role_set"):
            return
        if self.surrogate is None:
            raise ValueError(
                "surrogate is not given, but SCAR keeps the network's outputs on images from elsewhere: name a "
                "datamodule, for example PhotoPatchesDataModule."
            )
        self.surrogate.setup("fit")
        found: Any = getattr(self.surrogate, "train_set", None)
        if found is None:
            raise ValueError(
                f"surrogate is a {type(self.surrogate).__name__}, but must be a datamodule of Lethe's with a train_set."
            )
        shapes = [tuple(images[[0]]["image"].shape[1:]) for images in (found, datamodule.role_set("forget"))]
        if shapes[0] != shapes[1]:
            raise ValueError(f"surrogate has images of shape {shapes[0]}, but those of the data are {shapes[1]}.")
        self.update.feed = ForgetAndSurrogate(found)

    def _check_filled(self) -> None:
        super()._check_filled()
        given: Any = self.trainer.train_dataloader
        if isinstance(given, dict) and "surrogate" not in given:
            raise ValueError(
                "the loaders have no surrogate images, but SCAR keeps the network's outputs on images from elsewhere: "
                "give {'forget': …, 'remain': …, 'surrogate': …}."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the forget labels of the first batch; those of surrogate images mean nothing."""
        super().on_train_batch_start({"forget": batch["forget"]}, batch_idx)
