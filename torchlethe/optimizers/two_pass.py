"""The two passes of one step, over the parameter groups of any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.components import SharpnessEngine, frozen_statistics

Groups = Sequence[Mapping[str, Any]]


@dataclass
class FirstPass:
    """The gradients g of a first pass, which the update may need.

    Attributes:
        params: the parameters that have one: all of them where the update needs g, else those that may be perturbed.
        grads: their gradients; emptied by the climb unless the update needs them.
    """

    params: list[Tensor]
    grads: list[Tensor] = field(default_factory=list)


def all_params(groups: Groups) -> list[Tensor]:
    """The parameters of all groups."""
    return [param for group in groups for param in group["params"]]


def param_names(groups: Groups) -> dict[Tensor, str]:
    """Names of the parameters: those they were given with, otherwise their position."""
    names: dict[Tensor, str] = {}
    for group in groups:
        for place, param in enumerate(group["params"]):
            names[param] = group["param_names"][place] if "param_names" in group else str(len(names))
    return names


def clear(groups: Groups) -> None:
    """Set all gradients to None."""
    for param in all_params(groups):
        param.grad = None


def gradients(groups: Groups, engine: SharpnessEngine, perturbed: Callable[[Tensor], bool]) -> FirstPass:
    """Collect the gradients that are there.

    Raises:
        RuntimeError: one of them is sparse.
    """
    found = FirstPass([])
    for param in all_params(groups):
        if param.grad is None or not (engine.rule.keeps_first or perturbed(param)):
            continue
        if param.grad.is_sparse:
            raise RuntimeError(f"the parameter '{param_names(groups)[param]}' has a sparse gradient: use sparse=False.")
        found.params.append(param)
        found.grads.append(param.grad)
    return found


def climb(
    groups: Groups, engine: SharpnessEngine, step: int, perturbed: Callable[[Tensor], bool], first: FirstPass
) -> None:
    """Move the weights to w + ε."""
    drawn = engine.chosen(len(first.params), step) or [True] * len(first.params)
    moved = [i for i, param in enumerate(first.params) if drawn[i] and perturbed(param)]
    params = [first.params[i] for i in moved]
    radius = {param: engine.radius(group, step) for group in groups for param in group["params"]}
    names = param_names(groups) if groups and "param_names" in groups[0] else None
    engine.climb(
        params,
        [first.grads[i] for i in moved],
        [radius[param] for param in params],
        [names[param] for param in params] if names else None,
    )
    if not engine.rule.keeps_first:
        first.grads.clear()  # used up; the second pass may have the memory


def combine(engine: SharpnessEngine, first: FirstPass) -> None:
    """Make the update of g and of the gradients g̃ that are there, where it needs both."""
    if engine.rule.keeps_first:
        found = [(p, g, p.grad) for p, g in zip(first.params, first.grads, strict=True) if p.grad is not None]
        if found:
            params, grads, second = (list(part) for part in zip(*found, strict=True))
            engine.combine(params, grads, second)


def one_pass(engine: SharpnessEngine, groups: Groups) -> None:
    """Finish a step without a climb."""
    first = gradients(groups, engine, lambda param: True)
    engine.observe(first.params, first.grads)
    engine.reuse(first.params, first.grads)


def everything(param: Tensor) -> bool:
    """Perturb every parameter."""
    return True


def sam_step(
    optimizer: Any,
    closure: Callable[[], Tensor],
    engine: SharpnessEngine,
    module: nn.Module | None = None,
) -> Tensor:
    """One sharpness-aware step in a training loop of your own, for example under Lightning's manual optimization.

    The closure runs forward and backward on one batch and returns the loss; it is called twice. ``optimizer.step()`` is
    called once, so under Lightning ``global_step`` counts one. The engine is kept from step to step; to resume exactly,
    store ``engine.state_dict(names)`` in ``on_save_checkpoint``, with ``names`` from parameter to name.

    Example::

        def training_step(self, batch, batch_idx):
            def closure():
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            loss = sam_step(self.optimizers(), closure, self.engine, module=self)

    Args:
        optimizer: a torch, Lightning or Fabric optimizer around a plain base optimizer.
        closure: forward, backward (``self.manual_backward`` under Lightning), returns the loss.
        engine: the method.
        module: the network, when the second pass is to leave its running statistics alone.

    Returns:
        The loss at w, detached.

    Raises:
        ValueError: the optimizer makes two passes of its own, or gradients are scaled for fp16.

    Note:
        Under DDP both passes are averaged over ranks by the closure's backward.
    """
    from torchlethe.optimizers.base import SharpnessAwareOptimizer

    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, SharpnessAwareOptimizer):
        raise ValueError(
            f"optimizer is a {type(inner).__name__}, which makes two passes itself: use its step(closure)."
        )
    strategy = getattr(optimizer, "_strategy", None)
    if getattr(getattr(strategy, "precision_plugin", None), "scaler", None) is not None:
        raise ValueError("precision is 16-mixed, but sam_step sees scaled gradients: use bf16-mixed.")
    assert isinstance(inner, Optimizer)
    groups, step = inner.param_groups, engine.steps
    clear(groups)
    loss = closure()
    if engine.two_passes(step):
        second_pass(groups, engine, step, everything, closure, module)
    else:
        one_pass(engine, groups)
    optimizer.step()
    engine.after_step(groups)
    clear(groups)
    engine.steps += 1
    return loss.detach()


def second_pass(
    groups: Groups,
    engine: SharpnessEngine,
    step: int,
    perturbed: Callable[[Tensor], bool],
    closure: Callable[[], Any],
    module: nn.Module | None,
) -> Any:
    """Climb with the gradients that are there, run the closure, come back, and leave the update in the gradients.

    Returns:
        What the closure returned.
    """
    first = gradients(groups, engine, perturbed)
    climb(groups, engine, step, perturbed, first)
    try:
        clear(groups)
        with frozen_statistics(module.modules()) if module is not None else nullcontext(), torch.enable_grad():
            loss = closure()
    finally:
        engine.restore()
    combine(engine, first)
    return loss
