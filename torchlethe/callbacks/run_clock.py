"""The time that a run needs by itself: preparation and loop of a fit, without validation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from torchlethe.metrics.summary import RuntimeMeter


class RunClock(Callback):
    """Measure a fit: ``clock.seconds`` has ``prepare``, from fit start to the first epoch, and ``fit``, the loop.

    Validation does not count. What runs before ``on_fit_start`` or after ``on_train_end`` of this class does not
    either, so that a subclass may evaluate there. A resumed fit continues the times of its checkpoint. Each rank
    measures itself.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> run = RunClock()
        >>> trainer = Trainer(
        ...     max_steps=1, callbacks=[run], accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> sorted(run.clock.seconds)
        ['fit', 'prepare']
    """

    def __init__(self) -> None:
        self.clock = RuntimeMeter()
        self._paused: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts at zero; kernels of its device are awaited at the ends of a lap."""
        if stage == "fit":
            self.clock = RuntimeMeter(trainer.strategy.root_device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.clock.start("prepare")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Preparation is over; modules may prepare up to the end of their own ``on_train_start``."""
        if self.clock.running == "prepare":
            self.clock.start("fit")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same for a fit that resumes within an epoch, where no epoch starts."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for a validation."""
        self._paused = self.clock.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on after a validation."""
        if self._paused is not None:
            self.clock.start(self._paused)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.clock.stop()

    def state_dict(self) -> dict[str, Any]:
        """The time spent so far, for a resumed fit."""
        return {"seconds": self.clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.clock.load(state_dict["seconds"])


class RunEvaluation(RunClock):
    """A clock that evaluates when it has stopped: the base of the callbacks that judge a run at its end.

    Attributes:
        stages: when to evaluate, out of ``fit`` and ``test``.
    """

    stages: tuple[str, ...] = ("fit", "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and evaluate."""
        super().on_train_end(trainer, pl_module)
        if "fit" in self.stages:
            self._evaluate(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate."""
        if "test" in self.stages:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise NotImplementedError

    def _announce(self, trainer: Trainer, metrics: dict[str, float]) -> bool:
        """Add the run's time and give the Trainer the metrics, on every rank; returns whether this one writes files."""
        if own := sum(self.clock.seconds.values()):
            metrics["run_seconds"] = trainer.strategy.broadcast(own)
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()})
        rank_zero_info(f"{type(self).__name__}: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}")
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
