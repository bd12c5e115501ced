"""Stop at the first NaN or Inf, say where it arose, and keep the last good checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlethe.arguments import check_at_least


class NonFiniteError(RuntimeError):
    """A loss or a weight became NaN or infinite."""


class NonFiniteGuard(Callback):
    """Watch every loss; raise :class:`NonFiniteError` naming step and module once one is NaN or infinite.

    The loss is looked at before its backward pass. Where looking is free (CPU) this happens at every step, and the
    batch is run once more to find the first module whose output has a NaN or, where none has, an infinite value. On
    other devices a flag stays on the device and is read every ``every_n_steps`` steps, so that no step waits; the step
    is still exact, the module is then the first with a non-finite weight. No checkpoint is written once the flag is up
    or a weight is not finite, and a fit whose last step spoiled a weight fails too. Tensors that are not finite when
    training starts, such as a causal mask with -inf, are meant to be so and are not looked at.

    Args:
        every_n_steps: how often the flag is read on devices other than the CPU, at least 1 (1 also finds the module).

    Raises:
        ValueError: ``every_n_steps`` is below 1.

    Note:
        Under DDP each rank watches its own loss. The rank that finds it NaN or infinite raises; the others wait for it
        in the next collective and end with the process group's error.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.first_bad_step: Tensor | None = None
        self.batch: Any = None
        self.exempt: frozenset[str] = frozenset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the flag, and note which tensors are not finite by intention."""
        self.exempt = frozenset(_bad_weights(pl_module))
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
        if self.first_bad_step is not None and (name := _first_bad_weight(pl_module, self.exempt)):
            raise NonFiniteError(
                f"step {trainer.global_step}: the weight '{name}' is not finite; no checkpoint was written."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look a last time, also at what the last step made of the weights, and let go of the batch."""
        self.batch = None
        self._raise_if_bad(pl_module, rerun=False)
        if name := _first_bad_weight(pl_module, self.exempt):
            raise NonFiniteError(
                f"step {trainer.global_step}: the weight '{name}' is not finite after the last step; "
                "the last good checkpoint was kept."
            )

    def _raise_if_bad(self, pl_module: LightningModule, rerun: bool) -> None:
        step = -1 if self.first_bad_step is None else int(self.first_bad_step)
        if step < 0:
            return
        if rerun:
            name = _first_bad_output(pl_module, self.batch)
            where = f"first in the output of '{name}'" if name else "though every module's output is finite"
        else:
            name = _first_bad_weight(pl_module, self.exempt)
            where = f"and the weight '{name}' is not finite" if name else "while no weight has become non-finite"
        raise NonFiniteError(
            f"step {step}: the loss is NaN or infinite, {where}; the last good checkpoint was kept. "
            "A lower learning rate, clipping or bf16 in place of fp16 often helps."
        )


def _first_bad_weight(module: nn.Module, exempt: Collection[str]) -> str | None:
    return next((name for name in _bad_weights(module) if name not in exempt), None)


def _bad_weights(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers with a NaN or infinite value; of sharded ones, in this rank's part."""
    named = [(n, t) for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_floating_point()]
    if not named:
        return []
    local = [(t.to_local() if isinstance(t, DTensor) else t).detach() for _, t in named]
    # all answers in one message from the device
    finite = torch.stack([torch.isfinite(t).all() for t in local]).tolist()
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]


def _first_bad_output(pl_module: LightningModule, batch: Any) -> str | None:
    """Run the images of a batch through the module once more, and name where the loss went wrong.

    That is the first module with a NaN in its output. An infinite value counts only where there is no NaN, as a layer
    may give -inf by intention. Children come before their parents, so a parent is named for what it does itself.
    """
    with_nan: list[str] = []
    with_inf: list[str] = []
    names = {module: name or type(module).__name__ for name, module in pl_module.named_modules()}

    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _floats(output):
            if torch.isnan(tensor).any():
                with_nan.append(names[module])
            elif torch.isinf(tensor).any():
                with_inf.append(names[module])

    hooks = [module.register_forward_hook(check) for module in names]
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
    return next(iter(with_nan + with_inf), None)


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _floats(part)


def _images(batch: Any) -> list[Tensor]:
    if isinstance(batch, dict):
        return [batch["image"]] if "image" in batch else [image for part in batch.values() for image in _images(part)]
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return [batch[0]]
    return [image for part in batch for image in _images(part)] if isinstance(batch, list | tuple) else []
