"""What tells the methods of the sharpness-aware family apart: where to climb, and what to make of the two gradients.

Each rule is a few lines over :mod:`torchlethe.functional.perturbation`; :class:`~torchlethe.components.SharpnessEngine`
does the rest.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchlethe.arguments import check_at_least, check_choice, check_within
from torchlethe.data.hashing import generator_for
from torchlethe.functional.perturbation import (
    Tensors,
    friendly_average_,
    friendly_direction_,
    gsam_combine_,
    look_reuse_,
    orthogonal_component,
    sigma_of_paper_order,
    wsam_combine_,
)


class Memory:
    """What a rule keeps from step to step: named buffers, one tensor a parameter.

    Args:
        dtype: dtype of the buffers; the gradient's own by default.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.buffers: defaultdict[str, dict[Tensor, Tensor]] = defaultdict(dict)

    def known(self, name: str, params: Tensors, values: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """The values of the parameters that have a buffer, and these buffers."""
        found = self.buffers[name]
        if _same(found, params):
            return list(values), list(found.values())
        pairs = [(value, found[param]) for param, value in zip(params, values, strict=True) if param in found]
        return [value for value, _ in pairs], [buffer for _, buffer in pairs]

    def keep(self, name: str, params: Tensors, values: Tensors, overwrite: bool = False) -> None:
        """Store a copy for parameters without a buffer, or for all."""
        found = self.buffers[name]
        if overwrite:
            known, kept = self.known(name, params, values)
            if known:
                torch._foreach_copy_(kept, known)
        if _same(found, params):
            return
        for param, value in zip(params, values, strict=True):
            if param not in found:
                found[param] = value.detach().to(self.dtype or value.dtype, copy=True)


def _same(found: Mapping[Tensor, Tensor], params: Tensors) -> bool:
    """Whether a buffer is of just these parameters in this order, which spares a look-up (slow for tensors) each."""
    return len(found) == len(params) and all(map(operator.is_, found, params))


@dataclass(frozen=True)
class AscentRule:
    """SAM: climb along the gradient, step with the gradient found there (arXiv:2010.01412).

    The base of the other rules, which change what they have to. A rule is a value: what it remembers is in the memory
    that it is handed.
    """

    keeps_first: ClassVar[bool] = False
    """Whether the update needs the gradient of the first pass too."""
    epsilon: ClassVar[float] = 1e-12
    """Added to the norm of the direction."""
    buffer: ClassVar[str | None] = None
    """The name of the buffer it remembers."""

    def direction(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Turn g into d, in place."""

    def remember(self, params: Tensors, direction: Tensors, memory: Memory) -> None:
        """Update the memory after the climb's direction d was found to be finite."""

    def observe(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Look at g in a step without a second pass, and leave it alone."""

    def reuse(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Turn g into the update of a step without a second pass, in place."""

    def combine(self, params: Tensors, first: Tensors, second: Tensors, memory: Memory) -> list[Tensor] | None:
        """Turn g̃ into the update, in place; called where ``keeps_first``.

        Returns:
            What is to be subtracted, times the learning rate, after the base optimizer's step; mostly None.
        """
        return None

    def draw(self, count: int, seed: int, step: int) -> list[bool] | None:
        """Which of ``count`` tensors this step perturbs; None for all."""
        return None


@dataclass(frozen=True)
class FriendlyRule(AscentRule):
    """F-SAM: remove an average of past gradients from the climb's direction (arXiv:2403.12350, nblt/F-SAM).

    Args:
        sigma: share of the average that is removed, at least 0; 0 gives SAM.
        lmbda: decay of the average in [0, 1].
        order: ``code`` removes the average from before the batch, as the official code does; ``paper`` the one after
            it, which is the same for ``sigma=1``.
        min_noise_ratio: no climb where ‖d‖ is below this share of ‖g‖, as d then is rounding noise; 0 as published.
    """

    sigma: float = 1.0
    lmbda: float = 0.9
    order: Literal["code", "paper"] = "code"
    min_noise_ratio: float = 0.0
    buffer: ClassVar[str | None] = "ema"

    def __post_init__(self) -> None:
        check_at_least(0, sigma=self.sigma)
        check_within(0, 1, lmbda=self.lmbda)
        check_within(0, 1, "[)", min_noise_ratio=self.min_noise_ratio)
        check_choice(("code", "paper"), order=self.order)
        self.removed()  # refuses what the paper's order does not allow

    def removed(self) -> float:
        """The share of the average from before the batch that is removed, in either order."""
        return sigma_of_paper_order(self.sigma, self.lmbda) if self.order == "paper" else self.sigma

    def direction(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Make d = g − σ·m; without an average yet, d = g."""
        some, ema = memory.known("ema", params, grads)
        if some:
            friendly_direction_(some, ema, self.removed())

    def remember(self, params: Tensors, direction: Tensors, memory: Memory) -> None:
        """Update m ← λ·m + (1 − λ)·g; the first gradient starts it."""
        some, ema = memory.known("ema", params, direction)
        if some:
            friendly_average_(ema, some, self.removed(), self.lmbda)
        memory.keep("ema", params, direction)

    def observe(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Let the average follow also where there is no climb."""
        some, ema = memory.known("ema", params, grads)
        if some:
            friendly_average_(ema, some, 0.0, self.lmbda)
        memory.keep("ema", params, grads)


@dataclass(frozen=True)
class VarianceSuppressedRule(AscentRule):
    """VaSSO: climb along the average of past gradients (arXiv:2309.15639, BingcongLi/VaSSO).

    Args:
        theta: weight of the new gradient in the average, in (0, 1].
    """

    theta: float = 0.9
    epsilon: ClassVar[float] = 1e-7
    buffer: ClassVar[str | None] = "ema"

    def __post_init__(self) -> None:
        check_within(0, 1, "(]", theta=self.theta)

    def direction(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Make d = (1 − θ)·m + θ·g; without an average yet, d = g."""
        some, ema = memory.known("ema", params, grads)
        if some:
            torch._foreach_mul_(some, self.theta)
            torch._foreach_add_(some, ema, alpha=1 - self.theta)

    def remember(self, params: Tensors, direction: Tensors, memory: Memory) -> None:
        """The direction is the new average."""
        memory.keep("ema", params, direction, overwrite=True)

    def observe(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Let the average follow also where there is no climb."""
        some, ema = memory.known("ema", params, grads)
        if some:
            torch._foreach_mul_(ema, 1 - self.theta)
            torch._foreach_add_(ema, some, alpha=self.theta)
        memory.keep("ema", params, grads)


@dataclass(frozen=True)
class SurrogateGapRule(AscentRule):
    """GSAM: also descend the gap between perturbed and clean loss (arXiv:2203.08065).

    Args:
        alpha: weight of the part of g that is orthogonal to g̃, at least 0; 0 gives SAM.
    """

    alpha: float = 0.4
    keeps_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(0, alpha=self.alpha)

    def combine(self, params: Tensors, first: Tensors, second: Tensors, memory: Memory) -> list[Tensor] | None:
        """Make the update g̃ − α·g⊥."""
        gsam_combine_(first, second, self.alpha)
        return None


@dataclass(frozen=True)
class WeightedRule(AscentRule):
    """WSAM: weigh the sharpness as a regulariser (arXiv:2305.15817).

    Args:
        gamma: weight in [0, 1); 0 is the base optimizer, 0.5 is SAM.
        decoupled: step with g, then move by −lr·γ/(1−γ)·(g̃ − g) past momentum and moments; otherwise the base
            optimizer gets g + γ/(1−γ)·(g̃ − g).
    """

    gamma: float = 0.9
    decoupled: bool = True
    keeps_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_within(0, 1, "[)", gamma=self.gamma)

    def combine(self, params: Tensors, first: Tensors, second: Tensors, memory: Memory) -> list[Tensor] | None:
        """The coupled update, or g and a correction for after the step."""
        if not self.decoupled:
            wsam_combine_(first, second, self.gamma)
            return None
        correction = list(torch._foreach_sub(second, first))
        torch._foreach_mul_(correction, self.gamma / (1 - self.gamma))
        torch._foreach_copy_(second, first)
        return correction


@dataclass(frozen=True)
class LookRule(AscentRule):
    """LookSAM: two passes every few steps, between them the remembered difference (arXiv:2203.02714).

    Args:
        alpha: strength of the remembered component, at least 0. The paper's 0.7 hardly trains a CIFAR ResNet
            (reported by AndAgio/mia_bench, where 0.3 does).
    """

    alpha: float = 0.7
    keeps_first: ClassVar[bool] = True
    buffer: ClassVar[str | None] = "component"

    def __post_init__(self) -> None:
        check_at_least(0, alpha=self.alpha)

    def combine(self, params: Tensors, first: Tensors, second: Tensors, memory: Memory) -> list[Tensor] | None:
        """Keep the part of g̃ that is orthogonal to g; the update is g̃."""
        memory.keep("component", params, orthogonal_component(first, second), overwrite=True)
        return None

    def reuse(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Make the update g + α·‖g‖/‖g_v‖·g_v; without a g_v yet, g."""
        some, component = memory.known("component", params, grads)
        if some:
            look_reuse_(some, component, self.alpha)


@dataclass(frozen=True)
class EfficientRule(AscentRule):
    """ESAM: perturb some tensors, and run the second pass on some samples (arXiv:2110.03141).

    Args:
        beta: probability in (0, 1] that a step perturbs a tensor; ε is divided by it.
        gamma: share in (0, 1] of the samples, those whose loss rises most, that make the second pass.
    """

    beta: float = 0.6
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_within(0, 1, "(]", beta=self.beta, gamma=self.gamma)

    def draw(self, count: int, seed: int, step: int) -> list[bool] | None:
        """A coin for each tensor, a pure function of seed and step; at least one tensor is taken."""
        if self.beta == 1:
            return None
        generator = generator_for("tensors to perturb", seed, step)
        coins = torch.rand(count, generator=generator)
        return (coins <= max(self.beta, coins.min().item())).tolist()


@dataclass(frozen=True)
class FullGradientRule(AscentRule):
    """Climb along one of the two parts of g: the full gradient G, or the noise that is left of g without it.

    The experiment that F-SAM starts from (arXiv:2403.12350): with cos the cosine of g and G, g is the sum of its
    projection on G and of the noise g − (⟨g, G⟩/‖G‖²)·G. G is put into the memory as ``full`` by whoever computes it.

    Args:
        part: ``full`` or ``noise``.
    """

    part: Literal["full", "noise"] = "noise"
    buffer: ClassVar[str | None] = "full"

    def __post_init__(self) -> None:
        check_choice(("full", "noise"), part=self.part)

    def direction(self, params: Tensors, grads: Tensors, memory: Memory) -> None:
        """Make d = G, or d = g − (⟨g, G⟩/‖G‖²)·G."""
        some, full = memory.known("full", params, grads)
        if self.part == "full":
            torch._foreach_copy_(some, full)
        elif some:
            torch._foreach_copy_(some, orthogonal_component(full, some))


RULES: dict[str, type[AscentRule]] = {
    "fsam": FriendlyRule,
    "sam": AscentRule,
    "asam": AscentRule,
    "vasso": VarianceSuppressedRule,
    "gsam": SurrogateGapRule,
    "wsam": WeightedRule,
    "looksam": LookRule,
    "esam": EfficientRule,
}


def ascent_rule(method: str, **options: Any) -> AscentRule:
    """The rule of a method.

    Args:
        method: one of ``RULES``.
        options: the rule's arguments; None stands for its default.

    Raises:
        ValueError: there is no such method, or it has no such option.

    Example:
        >>> ascent_rule("fsam", lmbda=0.6, alpha=None)
        FriendlyRule(sigma=1.0, lmbda=0.6, order='code', min_noise_ratio=0.0)
    """
    check_choice(RULES, method=method)
    rule = RULES[method]
    allowed = [field.name for field in fields(rule)]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in allowed:
            options_text = f"its options are {', '.join(allowed)}" if allowed else "it has no options of its own"
            raise ValueError(f"{name} is no option of method={method!r}: {options_text}.")
    return rule(**given)
