"""The climb to the perturbed weights and the way back, for every method of the sharpness-aware family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.components.ascent_rules import AscentRule, EfficientRule, FriendlyRule, Memory, ascent_rule
from torchlethe.functional.perturbation import (
    Adaptive,
    Tensors,
    adaptive_scale,
    inner_product,
    norm_of_norms,
    total_norm,
)


class NonFiniteGradientError(RuntimeError):
    """The first pass gave a gradient that is NaN or infinite."""


class SharpnessEngine:
    """Perturb weights along a direction, bring them back, and make an update of the two gradients.

    One engine serves the callback, the optimizers and manual optimization::

        g = gradient at w                     # first pass
        engine.climb(params, g, rho)          # w ← w + ε
        g̃ = gradient at w + ε                 # second pass
        engine.restore()                      # w, to the bit
        engine.combine(params, g, g̃)          # the update, in g̃

    Everything is a handful of multi-tensor operations, and on a GPU nothing waits for a number.

    Args:
        method: a name of :data:`~torchlethe.components.RULES`, or a rule.
        rho: radius of the climb, positive. A method's own default is 0.05; that of ASAM 0.5 for ``eta`` and 2 for
            ``w2``.
        adaptive: scale the climb by the weights, as ASAM does: ``w2`` by w² throughout (davda54/sam), ``eta`` by
            (|w| + eta)² for parameters with "weight" in their name (SamsungLabs/ASAM). ``asam`` defaults to ``eta``.
        eta: added to |w| with ``adaptive="eta"``, at least 0.
        norm: ``global`` normalises the direction as one vector, ``layerwise`` each tensor by itself.
        interval: two passes every so many steps, between them one; 1 by default, 5 for LookSAM.
        warmup_steps: steps at the beginning that make one pass.
        rho_schedule: ``constant``; ``linear`` in the step from ``rho`` to ``rho_end``; ``lr``, the same share of the
            way as the learning rate's from its peak (a group's ``max_lr``, else ``initial_lr``) to its ``min_lr``,
            else 0 (GSAM).
        rho_end: radius at the end of the schedule, at least 0.
        memory_dtype: dtype of what a method remembers, or its name, for example "bfloat16" to halve it; the gradient's
            by default.
        seed: of ESAM's choice of tensors.
        options: the method's own options, see :func:`~torchlethe.components.ascent_rule`.

    Attributes:
        steps: optimizer steps so far, for whoever has no counter of their own.
        total_steps: optimizer steps of the whole run, for ``rho_schedule="linear"``.
        measured: after a climb with ``measure=True``, scalar tensors ``grad_norm``, ``noise_norm``, ``cos_g_m``.

    Raises:
        ValueError: an argument is out of range, or no option of the method.
    """

    def __init__(
        self,
        method: str | AscentRule = "fsam",
        rho: float | None = None,
        *,
        adaptive: Adaptive | None = None,
        eta: float = 0.01,
        norm: Literal["global", "layerwise"] = "global",
        interval: int | None = None,
        warmup_steps: int = 0,
        rho_schedule: Literal["constant", "linear", "lr"] = "constant",
        rho_end: float = 0.0,
        memory_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.rule = ascent_rule(method, **options) if isinstance(method, str) else method
        self.adaptive = adaptive or ("eta" if method == "asam" else None)
        if rho is None:
            rho = {"eta": 0.5, "w2": 2.0}[self.adaptive or "eta"] if method == "asam" else 0.05
        if interval is None:
            interval = 5 if method == "looksam" else 1
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(
                f"rho is {rho}, it must be a positive number (for no perturbation use the base optimizer)."
            )
        check_at_least(0, eta=eta, warmup_steps=warmup_steps, rho_end=rho_end)
        check_at_least(1, interval=interval)
        check_choice((None, "w2", "eta"), adaptive=self.adaptive)
        check_choice(("global", "layerwise"), norm=norm)
        check_choice(("constant", "linear", "lr"), rho_schedule=rho_schedule)
        self.rho, self.eta, self.norm, self.interval, self.warmup_steps = rho, eta, norm, interval, warmup_steps
        self.rho_schedule, self.rho_end, self.seed = rho_schedule, rho_end, seed
        self.total_steps: int | None = None
        self.steps = 0
        self.memory = Memory(_floating(memory_dtype))
        self.measured: dict[str, Tensor] = {}
        self._saved: dict[Tensor, Tensor] = {}
        self._climbed: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._bad: Tensor | None = None

    # --- when and how far -----------------------------------------------------------------------------------------

    def two_passes(self, step: int) -> bool:
        """Whether the optimizer step number ``step`` (from 0) makes two passes."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.interval == 0

    def radius(self, group: Mapping[str, Any], step: int) -> float:
        """The radius for a parameter group at a step; a group may have a ``rho`` of its own.

        Raises:
            ValueError: the linear schedule does not know the number of steps.
        """
        rho = float(group.get("rho", self.rho))
        if self.rho_schedule == "constant":
            return rho
        if self.rho_schedule == "linear":
            if not self.total_steps:
                raise ValueError("rho_schedule is 'linear', which needs a run of a known number of steps (max_steps).")
            left = max(0.0, 1 - step / self.total_steps)
        else:
            lr = float(group["lr"])
            peak = float(group.get("max_lr", group.get("initial_lr", lr)))
            low = float(group.get("min_lr", 0.0))
            left = min(1.0, max(0.0, (lr - low) / (peak - low))) if peak > low else 0.0
        return self.rho_end + (rho - self.rho_end) * left

    def chosen(self, count: int, step: int) -> list[bool] | None:
        """Which of ``count`` tensors the step perturbs (ESAM draws them); None for all."""
        return self.rule.draw(count, self.seed, step)

    # --- the climb ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def climb(
        self,
        params: Tensors,
        grads: Tensors,
        rho: Sequence[float],
        names: Sequence[str] | None = None,
        measure: bool = False,
    ) -> None:
        """Move the weights to w + ε and remember w.

        Args:
            params: the weights, changed in place.
            grads: their gradients of the mean loss, without loss scaling. They are used up, unless the method's rule
                ``keeps_first``.
            rho: radius of each parameter's group, of the same length.
            names: names of the parameters, for ``adaptive="eta"``.
            measure: also compute :attr:`measured`.

        Raises:
            NonFiniteGradientError: on a CPU at once, when a gradient is NaN or infinite; nothing is changed then. On
                other devices see :meth:`check`.
            ValueError: ``adaptive="eta"`` without names, or there is no parameter with a gradient.
        """
        if self._climbed:
            raise RuntimeError("climb was called twice without restore.")
        if not params:
            raise ValueError("no parameter that may be perturbed has a gradient.")
        floor = self.rule.min_noise_ratio if isinstance(self.rule, FriendlyRule) else 0.0
        grad_norm = total_norm(grads) if measure or floor else None
        if measure:
            self._measure_average(params, grads, grad_norm)
        self.rule.direction(params, grads, self.memory)
        scale = self._adaptive_scale(params, names)
        scaled = list(grads if scale is None else torch._foreach_mul(grads, scale))
        norms = torch._foreach_norm(scaled)
        norm = norm_of_norms(norms)
        if measure:
            self.measured["noise_norm"] = norm
        self._note_finite(norm)
        self.rule.remember(params, grads, self.memory)
        if scale is not None:
            torch._foreach_mul_(scaled, scale)
        self._save(params)
        if floor:
            assert grad_norm is not None
            norm = torch.where(norm < floor * grad_norm, torch.inf, norm)
        used_up = not self.rule.keeps_first or scale is not None
        for radius in dict.fromkeys(rho):
            here = [i for i, other in enumerate(rho) if other == radius]
            parts = norms if self.norm == "layerwise" else [norm] * len(norms)
            self._move([params[i] for i in here], [scaled[i] for i in here], radius, [parts[i] for i in here], used_up)

    def _move(self, params: list[Tensor], direction: list[Tensor], rho: float, norms: Tensors, used_up: bool) -> None:
        """Add ρ·d/N to parameters of one radius; the direction may be overwritten where it is not needed any more."""
        epsilon = 1e-16 if self.adaptive == "eta" else self.rule.epsilon
        length = rho / self.rule.beta if isinstance(self.rule, EfficientRule) else rho
        if self.norm == "layerwise":
            torch._foreach_add_(params, torch._foreach_mul(direction, [length / (norm + epsilon) for norm in norms]))
        elif norms[0].device.type == "cpu":
            # reading the number costs nothing here and saves a sweep over the direction
            torch._foreach_add_(params, direction, alpha=length / (float(norms[0]) + epsilon))
        elif used_up:
            torch._foreach_mul_(direction, length / (norms[0] + epsilon))
            torch._foreach_add_(params, direction)
        else:
            torch._foreach_add_(params, torch._foreach_mul(direction, length / (norms[0] + epsilon)))

    def _measure_average(self, params: Tensors, grads: Tensors, grad_norm: Tensor | None) -> None:
        assert grad_norm is not None
        self.measured = {"grad_norm": grad_norm}
        if self.rule.buffer == "ema":
            some, ema = self.memory.known("ema", params, grads)
            if some:
                both = total_norm(some) * total_norm(ema)
                self.measured["cos_g_m"] = inner_product(some, ema) / both.clamp_min(torch.finfo(both.dtype).tiny)

    def _adaptive_scale(self, params: Tensors, names: Sequence[str] | None) -> list[Tensor] | None:
        if self.adaptive is None:
            return None
        if self.adaptive == "eta" and names is None:
            raise ValueError("adaptive='eta' needs the names of the parameters: pass model.named_parameters().")
        return adaptive_scale(params, self.adaptive, self.eta, names or ())

    def _note_finite(self, norm: Tensor) -> None:
        if norm.device.type != "cpu":
            bad = ~torch.isfinite(norm)
            self._bad = bad if self._bad is None else self._bad | bad
        elif not math.isfinite(norm):  # reading a number costs nothing here
            self._bad = torch.tensor(True)
            self.check()

    def check(self) -> None:
        """Raise if a gradient was not finite since the last call; off the CPU this waits for the device.

        Raises:
            NonFiniteGradientError: see there.
        """
        bad, self._bad = self._bad, None
        if bad is not None and bad:
            raise NonFiniteGradientError(
                "the gradient of the first pass is NaN or infinite, so there is no direction to climb in: "
                "lower the learning rate or rho, or look for the operation that overflows (detect_anomaly)."
            )

    def _save(self, params: Tensors) -> None:
        if len(params) != len(self._saved) or any(a is not b for a, b in zip(params, self._saved, strict=True)):
            # other parameters than last time
            for param in params:
                if param not in self._saved:
                    self._saved[param] = torch.empty_like(param, memory_format=torch.preserve_format)
            copies = [self._saved[param] for param in params]
        else:
            copies = list(self._saved.values())
        torch._foreach_copy_(copies, list(params))
        self._climbed, self._copies = list(params), copies  # only now: an interrupt may come between any two lines

    @property
    def climbed(self) -> Sequence[Tensor]:
        """The parameters that are away from w."""
        return self._climbed

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back, to the bit and in their own storage; does nothing where they are not away."""
        if self._climbed:
            torch._foreach_copy_(self._climbed, self._copies)
        self._climbed, self._copies = [], []

    # --- the update -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def combine(self, params: Tensors, first: Tensors, second: Tensors, unscale: float | Tensor = 1.0) -> None:
        """Make the update of the two gradients, in place of the second.

        Args:
            params: the weights.
            first: their gradients g; only rules that ``keeps_first`` need them.
            second: their gradients g̃.
            unscale: what brings both to the true scale, for corrections that are applied past the loss scaler.
        """
        correction = self.rule.combine(params, first, second, self.memory)
        if correction is None:
            return
        if not isinstance(unscale, float) or unscale != 1:
            torch._foreach_mul_(correction, unscale)
        pending = self.memory.buffers["correction"]
        for param, part in zip(params, correction, strict=True):
            pending[param] = pending[param].add_(part) if param in pending else part

    @torch.no_grad()
    def observe(self, params: Tensors, grads: Tensors) -> None:
        """Show a method the gradients of a step with one pass; they stay as they are."""
        self.rule.observe(params, grads, self.memory)

    @torch.no_grad()
    def reuse(self, params: Tensors, grads: Tensors) -> None:
        """Let a method change the gradients of a step with one pass, in place."""
        self.rule.reuse(params, grads, self.memory)

    @torch.no_grad()
    def after_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Apply what acts after the base optimizer's step (decoupled WSAM).

        Args:
            groups: the optimizer's parameter groups, for their learning rates.
        """
        pending = self.memory.buffers.pop("correction", None)
        for group in groups if pending else ():
            params = [param for param in group["params"] if param in pending]  # type: ignore[operator]
            if params:
                parts = [pending[param] for param in params]  # type: ignore[index]
                torch._foreach_mul_(parts, -group["lr"])
                torch._foreach_add_(params, parts)

    # --- state ----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Come back if away, and let go of the memory that w was kept in."""
        self.restore()
        self._saved.clear()

    def forget(self) -> None:
        """Start anew: drop what was remembered of other parameters or of an earlier run."""
        self.release()
        self.memory.buffers.clear()
        self.measured, self._bad, self.steps = {}, None, 0

    def buffers(self) -> dict[str, dict[Tensor, Tensor]]:
        """What has to outlive a restart: by buffer, parameter → tensor. Never copies of the weights."""
        name = self.rule.buffer
        return {name: self.memory.buffers[name]} if name else {}

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """Number of steps, and what the method remembers by parameter name; tensors and plain values only.

        Args:
            names: names of the parameters.

        Raises:
            NonFiniteGradientError: a gradient was not finite, see :meth:`check`: such a state is not worth keeping.
        """
        self.check()
        memory = {
            buffer: {names[param]: value for param, value in found.items() if param in names}
            for buffer, found in self.buffers().items()
        }
        return {"steps": self.steps, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: it belongs to another method, or to a parameter that does not exist.
        """
        memory = state["memory"]
        if set(memory) != set(self.buffers()):
            kept, own = (", ".join(buffers) or "nothing" for buffers in (memory, self.buffers()))
            raise ValueError(f"the state holds {kept}, but this method keeps {own}: resume with the method it is from.")
        params = {name: param for param, name in names.items()}
        for buffer, found in memory.items():
            if unknown := sorted(found.keys() - params.keys()):
                raise ValueError(f"the state has '{unknown[0]}', which is no parameter of this model.")
            self.memory.buffers[buffer] = {
                params[name]: value.to(params[name].device, copy=True) for name, value in found.items()
            }
        self.steps = state["steps"]


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype, from its name too."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"memory_dtype is {dtype!r}, it must name a floating-point dtype such as 'bfloat16'.")
    return found
