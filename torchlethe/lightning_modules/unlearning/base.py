"""The Lightning shell of every unlearning method: hands its update rule data, backward pass and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from torchlethe.components import eval_mode
from torchlethe.data import Feed, model_input
from torchlethe.io import file_hash
from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.lightning_modules.loops import StepCounter, in_order
from torchlethe.updates import LossUpdate, UpdateRule
from torchlethe.updates.originals import KeepsOriginal


class UnlearningModule(ClassificationModule):
    """Run an update rule under Lightning: a method's module is this class with typed arguments.

    A rule that is one loss a batch runs with automatic optimization; any other runs with manual optimization, stops by
    itself after its ``steps``, and counts one ``global_step`` a batch however many optimizer steps it takes.

    ``forget_loss`` and ``remain_loss`` are logged in every step, what else a step measures in those that the Trainer
    writes (``log_every_n_steps``) and at the end.

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
        (networks without BatchNorm, or with it in eval mode; sizes of the roles divisible by the number of ranks).
        What is logged in a step is rank 0's share. Sharded networks (FSDP2) are refused.
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
            if lr_scheduler is not None:
                raise ValueError(f"lr_scheduler is given, but {type(update).__name__} has a schedule of its own.")
            # the run ends by its own steps; and the state after a step is the one to resume from
            for message in ("`max_epochs` was not set", "Using ModelCheckpoint with manual optimization"):
                warnings.filterwarnings("ignore", message=message)
        self.original_hash = file_hash(weights) if weights is not None else None
        self._restored: dict[str, Any] | None = None
        self._trainer_max_steps = -1

    @property
    def feed(self) -> Feed:
        """How the rule reads its data."""
        return self.update.feed

    @property
    def reads(self) -> frozenset[str]:
        """The roles that the rule reads."""
        return self.update.reads

    def setup(self, stage: str) -> None:
        """Check network, data and the Trainer's flags."""
        super().setup(stage)
        if stage == "fit" and isinstance(self.update, KeepsOriginal):
            self.update.keep_original(self.network)  # before a checkpoint replaces its weights
        if self.automatic_optimization or stage != "fit":
            return
        name, trainer = type(self).__name__, self.trainer
        if str(trainer.precision).startswith("16"):
            # the forgetting strength exceeds the range of fp16
            raise ValueError(f"precision is {trainer.precision}, {name} needs bf16-mixed, bf16-true, 32 or 64.")
        cut = trainer.limit_train_batches != 1.0 or trainer.overfit_batches  # type: ignore[attr-defined]
        if cut and not trainer.fast_dev_run and hasattr(trainer.datamodule, "role_loader"):  # type: ignore[attr-defined]
            raise ValueError(
                f"limit_train_batches and overfit_batches would break the order in which {name} reads its roles: "
                "set its steps instead."
            )

    def on_fit_start(self) -> None:
        """Let the run end after the rule's own number of steps, also when it is resumed there."""
        super().on_fit_start()
        self._trainer_max_steps = self.trainer.fit_loop.epoch_loop.max_steps
        self._limit_steps()

    def _limit_steps(self) -> None:
        own, given = getattr(self.update, "steps", None), self._trainer_max_steps
        if own:
            self.trainer.fit_loop.epoch_loop.max_steps = own if given < 0 else min(own, given)

    def on_fit_end(self) -> None:
        """Give the Trainer its own limit back."""
        self.trainer.fit_loop.epoch_loop.max_steps = self._trainer_max_steps
        super().on_fit_end()

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
            self._restored = None
        self._check_filled()
        if type(self.update).set_passes is not UpdateRule.set_passes:
            self.update.set_passes(self._passes())
            self._limit_steps()
        if isinstance(self.update, LossUpdate) and self.trainer.num_training_batches < float("inf"):
            steps, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
            if 0 < steps < float("inf"):
                self.update.set_length(int(steps), -(-int(batches) // self.trainer.accumulate_grad_batches))
        if not self.update.prepared:
            given = self._preparation_batches()
            self._check_outputs(given[min(given)])
            ahead = {"steps": StepsAhead(self.trainer)} if self.update.reads_ahead else {}
            logs = self.update.prepare(self.network, given | ahead)
            if self.logger is not None and logs:
                self.logger.log_metrics(logs, step=self.global_step)
        self.trainer.should_stop = self.trainer.should_stop or self.update.stopped

    def _check_outputs(self, batches: Iterable[Any]) -> None:
        """Ask a network whose head nobody could look at for the logits of one image, before anything is done to it."""
        if getattr(getattr(self.network, "head", None), "out_features", None) == self.num_classes:
            return
        # an iterator over a DataLoader draws from the global generator; training must not notice
        with isolate_rng(), torch.no_grad(), eval_mode(self):
            batch = next(iter(batches), None)
            if batch is not None:
                with self.trainer.precision_plugin.forward_context():
                    self.training_logits(model_input(batch)["image"][:1])

    def _check_filled(self) -> None:
        """Refuse an empty loader among several: Lightning would end the epoch before its first step."""
        given: Any = self.trainer.train_dataloader
        for role, loader in given.items() if isinstance(given, dict) else ():
            if isinstance(loader, Sized) and not len(loader):
                raise ValueError(f"the loader of {role} is empty, but {type(self).__name__} needs samples.")

    def _passes(self) -> dict[str, int]:
        """The number of batches of a pass over each role that is served."""
        given: Any = self.trainer.train_dataloader
        try:
            if isinstance(given, dict):
                return {role: len(loader) for role, loader in given.items()}
            served = getattr(getattr(given, "sampler", None), "passes", None)
            return dict(served) if served else {role: len(given) for role in self.reads}
        except TypeError:
            raise ValueError(f"{type(self).__name__} needs loaders that know their length.") from None

    def _preparation_batches(self) -> dict[str, Iterable[Any]]:
        """For each role that the rule reads its batches on the device, in order and without augmentation."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        given: Any = self.trainer.train_dataloader
        if hasattr(datamodule, "role_loader"):
            augmented = self.update.prepares_augmented
            loaders = {role: datamodule.role_loader(role, shuffle=augmented) for role in self.reads}
        elif isinstance(given, dict):
            if missing := sorted(self.reads - given.keys()):
                raise ValueError(f"{type(self).__name__} reads {', '.join(missing)} too: give a loader for each role.")
            loaders = {role: in_order(given[role], self.trainer) for role in self.reads}
        elif len(self.reads) == 1:
            loaders = dict.fromkeys(self.reads, in_order(given, self.trainer))
        else:
            raise ValueError(
                f"{type(self).__name__} reads {', '.join(sorted(self.reads))}: "
                "pass an UnlearningDataModule, or a dict with a loader for each."
            )
        return {role: TransferredBatches(loader, role, self.trainer) for role, loader in loaders.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One step of the rule."""
        loss: Tensor | None = None
        k, every = self.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if isinstance(self.update, LossUpdate):
            if isinstance(batch, dict) and len(self.reads) == 1 and set(batch) == self.reads:
                (batch,) = batch.values()
            loss, logs = self.update.loss(self.network, batch, k)
        else:
            logs = self.update.step(self.network, batch, k, self.manual_backward)
            counter: Any = self.optimizers()  # a list, unless the rule has no optimizer of its own
            (counter[0] if isinstance(counter, list) else counter).step()
            self.trainer.should_stop = self.trainer.should_stop or self.update.stopped
        shown = {name: value for name, value in logs.items() if name in ("forget_loss", "remain_loss")}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        # each name costs a small step as much as a layer does, and between two writes nobody reads it
        written = every and (k + 1) % every == 0
        if written or self.trainer.is_last_batch or self.trainer.should_stop:
            self.log_dict({name: value for name, value in logs.items() if name not in shown}, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a rule with automatic optimization change the gradients, before the Trainer clips them."""
        if isinstance(self.update, LossUpdate):
            self.update.before_optimizer_step()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does, then let a rule with automatic optimization look at the weights."""
        k = self.global_step
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.update, LossUpdate):
            self.update.after_optimizer_step(k)
            self.trainer.should_stop = self.trainer.should_stop or self.update.stopped

    def on_train_end(self) -> None:
        """Let the rule look back; say when the run was cut short, as its schedule then never came to its end."""
        self.update.finish(self.network)
        steps, trainer = getattr(self.update, "steps", 0), self.trainer
        if self.global_step < steps and not self.update.stopped and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warnings.warn(
                f"{type(self).__name__} stopped after {self.global_step} of {steps} steps: the Trainer's max_epochs or "
                "max_steps, or a callback, ended the run early.",
                stacklevel=2,
            )

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
            raise ValueError(
                f"the checkpoint was made from other weights ({state['original_hash'][:12]}…) "
                f"than '{self.weights_path}' ({self.original_hash[:12]}…)."
            )
        self._restored = state["update"]


class TransferredBatches:
    """Batches of one role, moved and transformed as Lightning would, for use outside its loops.

    The Trainer's hooks see what they see in training: a dict from role to batch.

    Args:
        loader: the role's batches.
        role: its name; None for batches that are such dicts already.
        trainer: the Trainer whose device, precision and hooks apply.
    """

    def __init__(self, loader: Iterable[Any], role: str | None, trainer: Trainer) -> None:
        self.loader, self.role, self.trainer = loader, role, trainer

    def __iter__(self) -> Iterator[Any]:
        trainer, module = self.trainer, self.trainer.lightning_module
        for batch in self.loader:
            wrapped: Any = batch if self.role is None else {self.role: batch}
            wrapped = trainer.precision_plugin.convert_input(wrapped)
            wrapped = module._on_before_batch_transfer(wrapped, dataloader_idx=0)
            wrapped = trainer.strategy.batch_to_device(wrapped, dataloader_idx=0)
            yield wrapped if self.role is None else wrapped[self.role]


class StepsAhead:
    """The batches of a fit's first steps, as the Trainer will pass them; reading them leaves its place alone.

    From plain loaders by role: batches in that order, though not the same ones where the loaders shuffle.

    Args:
        trainer: a Trainer whose module reads forget and remain.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "role_loader"):
            return iter(TransferredBatches(datamodule.train_dataloader(), None, self.trainer))
        return self._cycled()

    def _cycled(self) -> Iterator[dict[str, Any]]:
        given: Any = self.trainer.train_dataloader
        roles = {role: TransferredBatches(given[role], role, self.trainer) for role in ("forget", "remain")}
        sources = {role: iter(batches) for role, batches in roles.items()}
        while True:
            batch = {role: next(source, None) for role, source in sources.items()}
            for role in [role for role, part in batch.items() if part is None]:
                sources[role] = iter(roles[role])
                batch[role] = next(sources[role])
            yield batch
