"""The two passes of a sharpness-aware step, in the place of a module's training step and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from torchlethe.callbacks.gradient_sums import GradientScale, GradientSync, leave
from torchlethe.callbacks.risen_samples import (
    SampleLosses,
    collected_logits,
    cross_entropy_losses,
    cross_entropy_of,
    most_risen,
)
from torchlethe.callbacks.second_pass import RandomState, batch_size_of, muted, part_of, same_batch, uncounted
from torchlethe.components import SharpnessEngine, frozen_statistics
from torchlethe.components.ascent_rules import EfficientRule


@dataclass(frozen=True)
class PassOptions:
    """What of a step the engine does not decide; see :class:`~torchlethe.callbacks.SharpnessAware`."""

    ascent_fraction: float = 1.0
    scope: Literal["global", "local"] = "global"
    replay_rng: bool = False
    freeze: Literal["bn", "buffers", "none"] = "bn"
    sample_losses: SampleLosses | None = None


class TwoPasses:
    """Replaces ``strategy.training_step`` and ``module.backward`` until :meth:`remove`.

    Lightning calls the first, zeroes the gradients, and calls the second with the loss; all that follows (accumulation,
    clipping, the optimizer) is its own. A step runs like this::

        training_step   g's forward pass at w: what it returns, logs and counts is the step's
        backward        g;  engine.climb: w → w + ε;  g̃'s forward and backward pass, in silence;  engine.restore: w
                        p.grad = what was accumulated + the update

    Args:
        trainer: the Trainer, whose strategy is connected.
        module: the module.
        engine: the method.
        options: the rest.
        start: calls :meth:`begin`; needed when a tuner trains before callbacks may say that training starts.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        engine: SharpnessEngine,
        options: PassOptions,
        start: Callable[[], None],
    ) -> None:
        self.trainer, self.module, self.engine, self.options = trainer, module, engine, options
        rule = engine.rule
        self.installed, self.begun, self._start = True, False, start
        self.share_of_samples = rule.gamma if isinstance(rule, EfficientRule) else 1.0
        self._draws_tensors = isinstance(rule, EfficientRule) and rule.beta < 1
        self.layers: list[nn.Module] = []
        self.metrics: list[Metric] = []
        self.logs: dict[str, Any] = {}
        self._idle: list[Tensor] = []
        self._arguments: Any = None
        self._loss: Tensor | None = None
        self._clean_losses: Tensor | None = None
        self._second = False
        self._strategy_step, self._module_backward = trainer.strategy.training_step, module.backward
        self._undo = ExitStack()
        for owner, name, new in (
            (trainer.strategy, "training_step", self._training_step),
            (module, "backward", self._backward),
        ):
            self._undo.callback(_put_back, owner, name, owner.__dict__.get(name))
            owner.__dict__[name] = _Installed(new)
        self._undo.callback(module.__dict__.pop, "sam_pass", None)
        module.__dict__["sam_pass"] = 1

    def begin(self, optimizer: Optimizer, names: dict[Tensor, str], perturbed: set[Tensor] | None) -> None:
        """Take note of what is known once the optimizer is there.

        Args:
            optimizer: the base optimizer.
            names: names of the parameters.
            perturbed: the parameters to perturb; None for all.
        """
        if not self.begun:
            handle = optimizer.register_step_post_hook(lambda *_: self.engine.after_step(self.groups))
            self._undo.callback(handle.remove)
        self.begun, self.groups, self.names, self._perturbed = True, optimizer.param_groups, names, perturbed
        self.sync = GradientSync(self.trainer)
        self.scale = GradientScale(self.trainer, self.sync)
        self.look_at_module()
        compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in self.layers)
        # no idle parameters where the update needs all of g, nor where compiled graphs would differ from step to step
        self._skips = not self.engine.rule.keeps_first and not (
            compiled and isinstance(self.engine.rule, EfficientRule)
        )

    def look_at_module(self) -> None:
        """Look at the module's layers and metrics anew."""
        self.layers = list(self.module.modules())
        self.metrics = [layer for layer in self.layers if isinstance(layer, Metric)]

    def end_of_batch(self) -> None:
        """Let go of the batch, and of what was meant for a step that fp16's scaler, or the module, skipped."""
        self._arguments = self._clean_losses = self._loss = None
        if self._last:
            self.engine.memory.buffers.pop("correction", None)

    def remove(self) -> None:
        """Give strategy and module back what is theirs, wherever in a step they are."""
        self.engine.release()
        self._wake()
        self._undo.close()
        self.installed = False
        self._arguments = None
        self._clean_losses, self._loss = None, None

    # --- the first pass -------------------------------------------------------------------------------------------

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's training step at w; remembers what the second pass needs."""
        if not self.begun:
            self._start()
        self._arguments = same_batch((args, kwargs))
        self._plan(self.trainer.global_step)
        if self._two and self.options.ascent_fraction < 1:
            size = max(1, round(batch_size_of(args[0]) * self.options.ascent_fraction))
            args = (part_of(args[0], slice(size)), *args[1:])
        for param in self._idle:
            param.requires_grad_(False)
        self.sync.switch(self._reduced)
        try:
            with collected_logits(self.module, self._chooses_samples) as logits:
                output = self._strategy_step(*args, **kwargs)
        except BaseException:
            self._wake()
            raise
        loss = output.get("loss") if isinstance(output, Mapping) else output
        self._loss, self._clean_losses = loss.detach() if isinstance(loss, Tensor) else None, None
        if self._loss is None:
            self._wake()  # no backward pass will
        elif self._chooses_samples:
            self._clean_losses = self._sample_losses(logits)
        return output

    def _plan(self, step: int) -> None:
        """Decide what the two passes of a step do."""
        self._two = self.engine.two_passes(step)
        self._last = not self.trainer.fit_loop._should_accumulate()
        self._rng = RandomState(self.module.device) if self._two and self.options.replay_rng else None
        # lists rather than dicts: hashing a tensor costs as much as a small operation on it
        radii = [self.engine.radius(group, step) for group in self.groups]
        groups = zip(self.groups, radii, strict=True)
        self._radii = [(param, radius) for group, radius in groups for param in group["params"]]
        self._climbing = self._choose(step) if self._two else None
        if self._climbing is not None and self._skips:
            # weight gradients that the climb does not need are not computed
            self._idle = [param for param, _ in self._radii if param.requires_grad and param not in self._climbing]
        self._reduced = self._first_is_reduced()

    @property
    def _chooses_samples(self) -> bool:
        return self._two and self.share_of_samples < 1

    def _choose(self, step: int) -> set[Tensor] | None:
        """The parameters that this step perturbs, if they have a gradient; None for all."""
        params = [param for param, _ in self._radii if param.requires_grad]
        if self._perturbed is not None:
            params = [param for param in params if param in self._perturbed]
        drawn = self.engine.chosen(len(params), step)
        if self._perturbed is None and drawn is None:
            return None
        return {param for i, param in enumerate(params) if drawn is None or drawn[i]}

    def _wake(self) -> None:
        for param in self._idle:
            param.requires_grad_(True)
        self._idle = []

    @property
    def _watches(self) -> bool:
        """Whether a step with one pass concerns the method."""
        return self.engine.rule.buffer is not None

    def _first_is_reduced(self) -> bool:
        """Whether DDP averages the gradients of the pass at w."""
        if not self._two and not self._watches:
            return self._last
        # DDP waits for all gradients; where only some are computed they are averaged by hand
        return self.options.scope == "global" and not self._idle

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The module's backward pass at w, and the whole second pass."""
        if self._second or not (self._two or self._watches):
            self._module_backward(loss, *args, **kwargs)
            return
        unused = bool(self._idle) and not loss.requires_grad
        if unused and not self._draws_tensors:
            raise ValueError(
                "none of the parameters to perturb has a gradient: the loss of "
                f"{type(self.module).__name__} does not depend on those that 'perturb' selects."
            )
        stash = {param: param.grad for param, _ in self._radii if param.grad is not None}
        if self.sync.in_bucket:
            stash = {param: grad.clone() for param, grad in stash.items()}
        for param in stash:
            param.grad = None
        try:
            if not unused:  # ESAM may draw nothing but parameters that this loss does not depend on
                self._module_backward(loss, *args, **kwargs)
        finally:
            self._wake()
        params = [param for param, _ in self._radii if param.grad is not None]
        grads = [param.grad for param, _ in self._radii if param.grad is not None]
        sparse = next((i for i in range(len(grads)) if grads[i].is_sparse), None)
        if sparse is not None:
            raise ValueError(f"the parameter '{self.names[params[sparse]]}' has a sparse gradient: use sparse=False.")
        if self._two:
            self._climb_and_come_back(params, grads, stash, args, kwargs)
        else:
            self._one_pass(params, grads, stash)

    def _one_pass(self, params: list[Tensor], grads: list[Tensor], stash: dict[Tensor, Tensor]) -> None:
        """A step without a climb of a method that remembers something."""
        if self.engine.rule.buffer == "ema":
            true = grads if self.scale.is_one else [grad.clone() for grad in grads]
            if self.scale.remove_(true):
                self.engine.observe(params, true)
        self.engine.reuse(params, grads)
        leave(params, grads, stash)
        self._average_if_local()

    def _climb_and_come_back(
        self, params: list[Tensor], grads: list[Tensor], stash: dict[Tensor, Tensor], args: Any, kwargs: Any
    ) -> None:
        engine, keeps = self.engine, self.engine.rule.keeps_first
        if self.options.scope == "global" and not self._reduced:
            self.sync.average_(grads)
        if keeps and self.sync.in_bucket:
            grads = [grad.clone() for grad in grads]
        if not self.scale.remove_(grads):
            # an overflow of fp16, here or on another rank: the scaler has to see it, so that every rank skips the step
            for grad in grads[:1]:
                grad.fill_(torch.inf)
            leave(params, grads, stash)
            return
        rho = [radius for param, radius in self._radii if param.grad is not None]
        moved = [i for i, param in enumerate(params) if self._climbing is None or param in self._climbing]
        climbed, rho = [params[i] for i in moved], [rho[i] for i in moved]
        names = [self.names[param] for param in climbed] if engine.adaptive == "eta" else None
        every: int = 0 if self.trainer.barebones else self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        measure = every > 0 and ((self.trainer.global_step + 1) % every == 0 or self.trainer.should_stop)
        try:
            engine.measured = {}
            if climbed or not self._draws_tensors:
                engine.climb(climbed, [grads[i] for i in moved], rho, names, measure)
            if measure:
                engine.check()
            if not keeps:
                grads.clear()  # used up by the climb; the second pass may have the memory
            for param in params:
                param.grad = None
            for param, older in stash.items():
                param.grad = None if keeps else older
            perturbed = self._second_pass(args, kwargs)
        finally:
            engine.restore()
        if measure:
            self._note(perturbed)
        if keeps:
            self._combine(params, grads, stash)
            self._average_if_local()

    # --- the second pass ------------------------------------------------------------------------------------------

    def _second_pass(self, args: Any, kwargs: Any) -> Tensor:
        """Forward and backward at w + ε; the gradient is added to what is there."""
        module = self.module
        (batch, *rest), step_kwargs = self._arguments
        self._second, module.__dict__["sam_pass"] = True, 2
        try:
            with frozen_statistics(self.layers, self.options.freeze), muted(module), uncounted(self.metrics):
                if self._clean_losses is not None:
                    batch = most_risen(batch, self._sample_losses([]) - self._clean_losses, self.share_of_samples)
                if self._rng is not None:
                    self._rng.restore()
                self.sync.switch(self.options.scope == "global" if self.engine.rule.keeps_first else self._last)
                output = self._strategy_step(batch, *rest, **step_kwargs)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is None:
                    raise ValueError(
                        f"the training_step of {type(module).__name__} returned a loss in the first pass and None in "
                        "the second: it must skip a batch in both or in none (module.sam_pass says which pass it is)."
                    )
                self._module_backward(self.scale.of(loss), *args, **kwargs)
        finally:
            self._second, module.__dict__["sam_pass"] = False, 1
        return loss.detach()

    def _sample_losses(self, logits: list[Tensor]) -> Tensor:
        """The losses of the batch's samples, from logits that a pass gave anyway or from an extra forward pass."""
        batch = same_batch(self._arguments[0][0])
        losses = self.options.sample_losses or cross_entropy_losses
        with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
            if losses is cross_entropy_losses and len(logits) == 1:
                return cross_entropy_of(logits[0], batch)
            if self._rng is not None:
                self._rng.restore()
            with frozen_statistics(self.layers, self.options.freeze), muted(self.module), uncounted(self.metrics):
                return losses(self.module, batch).detach()

    def _combine(self, params: list[Tensor], first: list[Tensor], stash: dict[Tensor, Tensor]) -> None:
        """Make the update of both gradients, and add it to what was accumulated."""
        found = [(p, g, p.grad) for p, g in zip(params, first, strict=True) if p.grad is not None]
        both, grads, second = (list(part) for part in zip(*found, strict=True)) if found else ([], [], [])
        if not self.scale.remove_(second):
            for grad in second[:1]:
                grad.fill_(torch.inf)  # as in the first pass
        elif found:
            self.engine.combine(both, grads, second, 1 / self.trainer.accumulate_grad_batches)
            self.scale.apply_(second)
        present = [(param, param.grad) for param, _ in self._radii if param.grad is not None]
        leave([param for param, _ in present], [grad for _, grad in present], stash)

    def _average_if_local(self) -> None:
        """Average what was left local, where DDP did not do it."""
        if self.options.scope == "local" and self._last:
            pending = self.engine.memory.buffers.get("correction", {})
            self.sync.average_([p.grad for p, _ in self._radii if p.grad is not None] + list(pending.values()))

    def _note(self, perturbed: Tensor) -> None:
        values: dict[str, Any] = {
            "loss_perturbed": perturbed,
            **self.engine.measured,
            "rho": max(rho for _, rho in self._radii),
        }
        if self._loss is not None and self.options.ascent_fraction == 1 and not self._chooses_samples:
            values["sharpness"] = perturbed - self._loss
        self.logs = {f"sam/{name}": value for name, value in values.items()}


class _Installed:
    """A function in the place of a method; a copy of its owner (as weight averaging makes) does not copy the callback.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Installed:
        return self


def _put_back(owner: Any, attribute: str, value: Any) -> None:
    if value is None:
        owner.__dict__.pop(attribute, None)
    else:
        owner.__dict__[attribute] = value
