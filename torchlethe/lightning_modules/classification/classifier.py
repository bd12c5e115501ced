"""Training a classifier: the recipe that Original and Retrain share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from torchlethe.arguments import check_at_least, check_within
from torchlethe.data import PADDING_LABEL, Feed, Single, mix_seed, model_input
from torchlethe.lightning_modules.base import ClassificationModule


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the usual settings for CIFAR networks."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Classifier(ClassificationModule):
    """Train an image classifier with cross-entropy.

    Precision, accumulation, clipping and the number of epochs are flags of the Trainer. Logs ``train_loss`` and
    ``train_accuracy`` beside what :class:`~torchlethe.lightning_modules.ClassificationModule` logs.

    Args:
        network: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the learning-rate scheduler from the optimizer; none keeps the rate.
        lr_interval: whether the scheduler steps after each ``epoch`` or each ``step``.
        label_smoothing: share of the label given to all classes, in [0, 1).
        mixup: parameter alpha of the Beta distribution of mixup (Zhang et al., ICLR 2018); 0 switches it off.
        cutmix: the same for CutMix (Yun et al., ICCV 2019); with both, each batch gets one of the two at random.
        weights: file to start from, see :func:`torchlethe.io.load_weights`.
        seed: seed of mixup and CutMix, which are functions of seed and step alone.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP, gradients are averaged over ranks: two ranks with half the batch each compute what one process
        computes (BatchNorm uses each rank's own statistics unless the Trainer has ``sync_batchnorm``; mixup and CutMix
        mix within a rank).

    Example:
        >>> from torchlethe.models import MLP
        >>> module = Classifier(MLP(), num_classes=10)
        >>> tuple(module(torch.rand(2, 1, 8, 8)).shape)
        (2, 10)
    """

    feed: Feed = Single("train")

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        weights: str | Path | None = None,
        seed: int = 0,
        cutmix: float = 0.0,
    ) -> None:
        check_within(0, 1, "[)", label_smoothing=label_smoothing)
        check_at_least(0, mixup=mixup, cutmix=cutmix)
        super().__init__(network, num_classes, weights)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        mixtures = [
            kind(alpha=alpha, num_classes=num_classes)
            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self.mixture = v2.RandomChoice(mixtures) if len(mixtures) > 1 else mixtures[0] if mixtures else None
        self.seed = seed
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=PADDING_LABEL)

    @property
    def reads(self) -> frozenset[str]:
        """The roles whose data the module is trained on when a split is at hand."""
        return self.feed.roles

    def configure_optimizers(self) -> Any:
        """One optimizer over the trainable parameters, with its scheduler."""
        optimizer = self.optimizer([p for p in self.network.parameters() if p.requires_grad])
        return self.with_scheduler(optimizer, self.lr_scheduler, self.lr_interval)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        batch = model_input(batch)
        image, label = batch["image"], batch["label"]
        target = label
        if self.mixture is not None:
            # the CPU's generator alone: reseeding a GPU's would repeat its dropout
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed(self.seed, self.trainer.fit_loop.total_batch_idx))
                image, target = self.mixture(image, label)
        logits = self.training_logits(image)
        loss = self.loss(logits, target)
        self.train_accuracy.update(logits.detach(), label)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(label))
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(label))
        return loss
