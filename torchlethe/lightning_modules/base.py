"""What every module around an image classifier shares: logits, evaluation, weights, hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from torchlethe.arguments import check_at_least
from torchlethe.data import PADDING_LABEL, model_input
from torchlethe.io import load_weights
from torchlethe.models.layout import channels_last_on_cpu


class ClassificationModule(LightningModule):
    """A network that maps images to logits, and its evaluation; the base of every classifier module here.

    Validation and test log the loss (nats), the accuracy and the expected calibration error, the last two in [0, 1],
    as ``val_loss``, ``val_accuracy``, ``val_calibration_error`` and ``test_…``.

    Args:
        network: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes, at least 2.
        weights: file to load into the network, see :func:`torchlethe.io.load_weights`.

    Raises:
        FileNotFoundError: ``weights`` does not exist.
        ValueError: an argument is out of range, the weights do not fit, or network, data and ``num_classes`` disagree.

    Note:
        Under DDP metrics are summed over ranks, and the samples that pad the last batches are left out.
    """

    def __init__(self, network: nn.Module, num_classes: int, weights: str | Path | None = None) -> None:
        super().__init__()
        check_at_least(2, num_classes=num_classes)
        self.save_plain_hyperparameters()
        self.network = network
        self.num_classes = num_classes
        self.weights_path = Path(weights) if weights is not None else None
        if weights is not None:
            load_weights(network, weights)
        self._labels_checked = False
        self._predicted = 0
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=PADDING_LABEL),
                "calibration_error": MulticlassCalibrationError(num_classes, ignore_index=PADDING_LABEL),
            }
        )
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def save_plain_hyperparameters(self) -> None:
        """Keep the constructor's arguments in the checkpoint, in a form that loads without executing code.

        Under LightningCLI that is the whole configuration; in plain Python, the arguments that are plain values. The
        path of the first weights is left out: a checkpoint holds its own, and must load where that file is gone.
        """
        ignore = ["weights"]
        frame = inspect.currentframe()
        # every __init__ between the caller and this class belongs to this object and brings arguments
        while _given_hyperparameters.get() is None and (frame := frame.f_back if frame else None):
            if frame.f_code.co_name != "__init__" or frame.f_locals.get("self") is not self:
                break
            ignore += [name for name, value in frame.f_locals.items() if not _is_plain(value)]
        self.save_hyperparameters(ignore=ignore, frame=inspect.currentframe().f_back)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)`` in [0, 1]."""
        return self.network(image)

    @property
    def reads(self) -> frozenset[str]:
        """The roles whose data the module is trained on when a split is at hand."""
        return frozenset({"train"})

    def configure_model(self) -> None:
        """Refuse strategies that shard the network; on a CPU choose the layout in which it is fast."""
        if self.device_mesh is not None:
            raise ValueError(f"{type(self).__name__} does not run with sharded networks yet: use the strategy ddp.")
        if self._trainer is not None and self.trainer.strategy.root_device.type == "cpu":
            channels_last_on_cpu(self.network)

    def setup(self, stage: str) -> None:
        """Check that the network's head, the data and ``num_classes`` agree, and that the roles read are there."""
        datamodule = getattr(self.trainer, "datamodule", None)
        divided = hasattr(datamodule, "role_loader")
        if stage == "fit" and hasattr(datamodule, "train_set") and not divided and self.reads & {"forget", "remain"}:
            raise ValueError(
                f"{type(self).__name__} reads {' and '.join(sorted(self.reads))}, but {type(datamodule).__name__} "
                "is not divided: wrap it, UnlearningDataModule(data, forget)."
            )
        head = getattr(self.network, "head", None)
        outputs = getattr(head, "out_features", self.num_classes)
        if outputs != self.num_classes:
            raise ValueError(f"the network's head has {outputs} outputs, num_classes is {self.num_classes}.")
        classes = getattr(datamodule, "num_classes", None)
        if classes not in (None, self.num_classes):
            raise ValueError(f"the data has {classes} classes, num_classes is {self.num_classes}.")

    def on_fit_start(self) -> None:
        """Train a network that was handed over in eval mode; single layers that the user froze stay as they are."""
        self._labels_checked = False
        if not any(module.training for module in self.network.modules()):
            self.network.train()

    def on_fit_end(self) -> None:
        """Refuse to have done nothing: Lightning skips a fit without batches, and says so in a note at most."""
        trainer: Any = self.trainer
        if trainer.limit_train_batches and trainer.num_training_batches == 0:
            roles = " and ".join(sorted(self.reads))
            raise ValueError(f"the loader of {roles} is empty, but {type(self).__name__} needs samples.")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the labels of the first batch, before the loss stumbles over one."""
        if self._labels_checked:
            return
        self._labels_checked = True
        parts = list(batch.values()) if isinstance(batch, dict) and set(batch) <= self.reads else [batch]
        for labels in (model_input(part)["label"] for part in parts):
            low, high = int(labels.min()), int(labels.max())
            if high >= self.num_classes or (low < 0 and low != PADDING_LABEL):
                bad = high if high >= self.num_classes else low
                raise ValueError(
                    f"a label is {bad}, with num_classes={self.num_classes} it must lie in 0…{self.num_classes - 1}."
                )

    def training_logits(self, image: Tensor) -> Tensor:
        """Logits in at least float32, checked for their shape."""
        logits = self(image)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"the network gives logits of shape {tuple(logits.shape)}, expected (batch, {self.num_classes})."
            )
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def configure_optimizers(self) -> Any:
        """The optimizer, with a scheduler when there is one."""
        raise NotImplementedError(f"{type(self).__name__} has no optimizer.")

    @staticmethod
    def with_scheduler(optimizer: torch.optim.Optimizer, factory: Callable[..., Any] | None, interval: str) -> Any:
        """What Lightning expects of ``configure_optimizers`` for one optimizer and an optional scheduler factory."""
        if factory is None:
            return optimizer
        scheduler = factory(optimizer)
        settings = {"scheduler": scheduler, "interval": interval, "monitor": getattr(scheduler, "monitor", "val_loss")}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, self.val_metrics, self.val_loss, "val_loss")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the test metrics."""
        self._evaluate(batch, self.test_metrics, self.test_loss, "test_loss")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits ``(B, num_classes)`` and the index ``(B,)`` of each image; labels are not needed.

        The index of padding is -1. Batches without ``index`` are counted in the order of this process.
        """
        if not isinstance(batch, dict):
            batch = {"image": batch[0] if isinstance(batch, list | tuple) else batch}
        logits = self(model_input(batch | {"label": batch.get("label", torch.zeros(0, dtype=torch.long))})["image"])
        self._predicted = len(logits) + (self._predicted if batch_idx else 0)
        counted = torch.arange(self._predicted - len(logits), self._predicted, device=logits.device)
        return {"index": batch.get("index", counted), "logits": logits}

    def _evaluate(self, batch: Any, metrics: MetricCollection, mean_loss: MeanMetric, name: str) -> None:
        batch = model_input(batch)
        logits, labels = self.training_logits(batch["image"]), batch["label"]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING_LABEL)
        metrics.update(logits, labels)
        mean_loss.update(losses, (labels != PADDING_LABEL).to(losses.dtype))
        self.log(name, mean_loss, prog_bar=True, batch_size=len(labels))
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
