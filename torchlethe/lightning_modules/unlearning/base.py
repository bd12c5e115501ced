"""The Lightning shell of every unlearning method: hands its update rule data, backward pass and checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from torchlethe.data import Feed
from torchlethe.io import file_hash
from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.updates import LossUpdate, UpdateRule


class StepCounter(torch.optim.Optimizer):
    """An optimizer that changes nothing: stepping it once a batch makes Lightning count one ``global_step`` a batch."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        """Run the closure, when there is one."""
        return closure() if closure is not None else None


class UnlearningModule(ClassificationModule):
    """Run an update rule under Lightning: a method's module is this class with typed arguments.

    A rule that is one loss a batch runs with automatic optimization; any other runs with manual optimization, stops by
    itself after its ``steps``, and counts one ``global_step`` a batch however many optimizer steps it takes.

    The data comes from an :class:`~torchlethe.datamodules.UnlearningDataModule`, which hands over the roles that the
    rule reads and no other, or from plain loaders by role: ``trainer.fit(module, {"forget": …, "remain": …})`` (for
    rules that read one role, one plain loader).

    Args:
        network: the trained classifier, maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes.
        update: the rule.
        weights: file with the original model's weights; without it the network is taken as it is.
        lr_scheduler: makes a scheduler from the optimizer, for rules with automatic optimization.
        lr_interval: whether that scheduler steps after each ``epoch`` or each ``step``.

    Raises:
        ValueError: an argument or the combination with the Trainer's flags is not allowed.

    Note:
        Under DDP gradients are averaged over ranks by Lightning's backward pass, statistics such as the Fisher
        information are summed over ranks; with batches of half the size two ranks compute what one process computes
        (networks without BatchNorm, or with it in eval mode).
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        update: UpdateRule,
        weights: str | Path | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(network, num_classes, weights)
        self.update = update
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.automatic_optimization = isinstance(update, LossUpdate)
        if not self.automatic_optimization:
            # the run ends by its own steps; and the state after a step is the one to resume from
            for message in ("`max_epochs` was not set", "Using ModelCheckpoint with manual optimization"):
                warnings.filterwarnings("ignore", message=message)
        self.original_hash = file_hash(weights) if weights is not None else None
        self.prepare_seconds = 0.0
        self._restored: dict[str, Any] | None = None

    @property
    def feed(self) -> Feed:
        """How the rule reads its data."""
        return self.update.feed

    @property
    def reads(self) -> frozenset[str]:
        """The roles that the rule reads."""
        return self.update.reads

    def setup(self, stage: str) -> None:
        """Check network and data; manual optimization refuses fp16, whose range the forgetting strength exceeds."""
        super().setup(stage)
        if not self.automatic_optimization and str(self.trainer.precision).startswith("16"):
            raise ValueError(
                f"precision is {self.trainer.precision}, {type(self).__name__} needs bf16-mixed, bf16-true, 32 or 64."
            )

    def configure_optimizers(self) -> Any:
        """The rule's optimizers, and with manual optimization the one that counts batches."""
        optimizers = self.update.configure(self.network)
        if self.automatic_optimization:
            return self.with_scheduler(optimizers[0], self.lr_scheduler, self.lr_interval)
        return [StepCounter(), *optimizers]

    def on_train_start(self) -> None:
        """Let the rule prepare, or restore what it had prepared."""
        if self._restored is not None:
            self.update.load_state_dict(self._restored)
        if not self.update.prepared:
            start = time.perf_counter()
            logs = self.update.prepare(self.network, self._preparation_loaders())
            self.prepare_seconds = time.perf_counter() - start
            if self.logger is not None and logs:
                self.logger.log_metrics(logs, step=self.global_step)
        self.network.train()

    def _preparation_loaders(self) -> dict[str, Iterable[Any]]:
        """A loader for each role that the rule reads, on the device, in order and without augmentation."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "role_loader"):
            return {role: _Transferred(datamodule.role_loader(role), self.trainer) for role in self.reads}
        loaders: Any = self.trainer.train_dataloader
        if isinstance(loaders, dict):
            missing = sorted(self.reads - loaders.keys())
            if missing:
                raise ValueError(f"{type(self).__name__} reads {', '.join(missing)} too: give a loader for each role.")
            return {role: _Transferred(loaders[role], self.trainer) for role in self.reads}
        if len(self.reads) == 1:
            return dict.fromkeys(self.reads, _Transferred(loaders, self.trainer))
        raise ValueError(
            f"{type(self).__name__} reads {', '.join(sorted(self.reads))}: "
            "pass an UnlearningDataModule, or a dict with a loader for each."
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One step of the rule."""
        if self.automatic_optimization:
            assert isinstance(self.update, LossUpdate)
            loss, logs = self.update.loss(self.network, batch, self.global_step)
        else:
            loss, logs = None, self.update.step(self.network, batch, self.global_step, self.manual_backward)
            self.optimizers()[0].step()  # type: ignore[index]
        self.log_dict(logs, prog_bar=True, batch_size=1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the rule's own number of steps."""
        if self.global_step >= getattr(self.update, "steps", float("inf")):
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Let the rule look back."""
        self.update.finish(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rule's state, the original model's hash and the split's hash."""
        split = getattr(getattr(self.trainer, "datamodule", None), "split", None)
        checkpoint["unlearning"] = {
            "update": self.update.state_dict(),
            "original_hash": self.original_hash,
            "split_hash": getattr(split, "hash", None),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rule's state until its optimizers exist; refuse another original model."""
        state = checkpoint.get("unlearning")
        if state is None:
            return
        if self.original_hash and state["original_hash"] and self.original_hash != state["original_hash"]:
            raise ValueError("the checkpoint was made from other weights than the 'weights' given now.")
        self._restored = state["update"]
        rank_zero_info(f"{type(self).__name__}: resuming after {checkpoint.get('global_step', 0)} steps.")


class _Transferred:
    """A loader whose batches are moved and prepared as Lightning would in evaluation, for use outside its loops."""

    def __init__(self, loader: Iterable[Any], trainer: Trainer) -> None:
        self.loader, self.trainer = loader, trainer

    def __iter__(self) -> Iterator[Any]:
        device = self.trainer.strategy.root_device
        prepare = getattr(getattr(self.trainer, "datamodule", None), "prepare_batch", move_data_to_device)
        for batch in self.loader:
            yield self.trainer.precision_plugin.convert_input(prepare(batch, device))
