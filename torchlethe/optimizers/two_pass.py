"""The two passes of one step, over the parameter groups of any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    drawn = engine.chosen(len(first.params), step)
    moved = [i for i, param in enumerate(first.params) if (drawn is None or drawn[i]) and perturbed(param)]
    params = [first.params[i] for i in moved]
    radius = {p: rho for group in groups for rho in [engine.radius(group, step)] for p in group["params"]}
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
