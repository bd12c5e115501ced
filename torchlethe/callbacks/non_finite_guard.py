"""Stop at the first NaN or Inf, say where it arose, and keep the last good checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """A loss or a weight became NaN or infinite."""


class NonFiniteGuard(Callback):
    """Watch every loss; raise :class:`NonFiniteError` naming step and module once one is NaN or infinite.

    The loss is looked at before its backward pass. Where looking is free (CPU) this happens at every step, and the
    batch is run once more to find the first module whose output is not finite. On other devices a flag stays on the
    device and is read every ``every_n_steps`` steps, so that no step waits; the step is still exact, the module is then
    the first with a non-finite weight. No checkpoint is written once the flag is up or a weight is not finite.

    Args:
        every_n_steps: how often the flag is read on devices other than the CPU, at least 1 (1 also finds the module).

    Raises:
        ValueError: ``every_n_steps`` is below 1.

    Note:
        Under DDP each rank watches its own loss; gradients spread a NaN to all ranks in the same step.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, it must be at least 1.")
        self.every_n_steps = every_n_steps
        self.first_bad_step: Tensor | None = None
        self.batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the flag."""
        self.first_bad_step = torch.full((), -1, dtype=torch.long, device=pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch of the running step."""
        self.batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise the flag when the loss is not finite."""
        if self.first_bad_step is None:
            return
        step = trainer.fit_loop.total_batch_idx
        bad = ~torch.isfinite(loss.detach()).all() & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)
        every_step = self.every_n_steps == 1 or loss.device.type == "cpu"
        if every_step or step % self.every_n_steps == 0:
            self._raise_if_bad(pl_module, rerun=every_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a checkpoint of non-finite weights over good ones."""
        self._raise_if_bad(pl_module, rerun=False)
        if name := _first_bad_weight(pl_module):
            raise NonFiniteError(
                f"step {trainer.global_step}: the weight '{name}' is not finite; no checkpoint was written."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look a last time, and let go of the batch."""
        self.batch = None
        self._raise_if_bad(pl_module, rerun=False)

    def _raise_if_bad(self, pl_module: LightningModule, rerun: bool) -> None:
        step = -1 if self.first_bad_step is None else int(self.first_bad_step)
        if step < 0:
            return
        if rerun:
            name = _first_bad_output(pl_module, self.batch)
            where = f"first in the output of '{name}'" if name else "though every module's output is finite"
        else:
            name = _first_bad_weight(pl_module)
            where = f"and the weight '{name}' is not finite" if name else "while all weights are finite"
        raise NonFiniteError(
            f"step {step}: the loss is NaN or infinite, {where}; the last good checkpoint was kept. "
            "A lower learning rate, clipping or bf16 in place of fp16 often helps."
        )


def _first_bad_weight(module: nn.Module) -> str | None:
    named = [(n, t) for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_floating_point()]
    if not named:
        return None
    # one message from the device for all weights; a norm is finite exactly when its elements are (and do not overflow)
    finite = torch.stack([torch.isfinite(t.detach()).all() for _, t in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def _first_bad_output(pl_module: LightningModule, batch: Any) -> str | None:
    """Run the images of a batch through the module once more, and name the first output that is not finite."""
    bad: list[str] = []
    names = {module: name for name, module in pl_module.named_modules()}

    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
            bad.append(names[module])

    leaves = [module for module in pl_module.modules() if not list(module.children()) and module in names]
    hooks = [module.register_forward_hook(check) for module in leaves]
    buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
    try:
        with torch.no_grad():
            for image in _images(batch):
                pl_module(image)
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(buffers[name])
    return bad[0] if bad else None


def _images(batch: Any) -> list[Tensor]:
    if isinstance(batch, dict):
        return [batch["image"]] if "image" in batch else [image for part in batch.values() for image in _images(part)]
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return [batch[0]]
    return [image for part in batch for image in _images(part)] if isinstance(batch, list | tuple) else []
