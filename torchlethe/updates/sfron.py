"""SFRon: saliency-masked, adaptively weighted forgetting steps, interleaved with repair steps on the remaining data.

Source: Huang et al., NeurIPS 2024, https://arxiv.org/abs/2409.19732; official code
https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry (``Classification/``). The defaults are the code's, but
for ``loss_floor`` (1e-6 in place of 0), which guards against samples whose loss is exactly 0.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.arguments import check_above, check_at_least, check_choice, check_within
from torchlethe.components import (
    AdaptiveForgetLoss,
    DiagonalFisher,
    FastSlowUpdater,
    ForgetWatch,
    SaliencyMask,
    batch_norm_in_eval,
    restored,
)
from torchlethe.data import Interleaved
from torchlethe.functional.forgetting import forget_schedule, saliency_ratio, weight_entropy
from torchlethe.updates.base import (
    Backward,
    OptimizerFactory,
    UpdateRule,
    cross_entropy,
    default_optimizer,
    logits_and_labels,
    plain_backward,
)
from torchlethe.updates.strength import (
    START,
    InterleavedHeldOut,
    averaged_backward,
    find_strength,
    in_pairs,
    mean_loss,
)

MaskRule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], SaliencyMask]


class SFRonUpdate(UpdateRule):
    """The SFRon procedure; the arguments are those of :class:`torchlethe.lightning_modules.SFRon`.

    Iteration k of ``steps`` takes, when ``forget_every`` divides k, one forgetting step (the gradient of -alpha ·
    schedule(k / steps) · weighted loss, masked, then clipped), and always one descent step on the remaining data.

    Args:
        steps: number K of iterations, each with one remaining batch.
        forget_every: iterations T from one forgetting step to the next.
        optimizer: makes the optimizer; shared by both kinds of step unless ``forget_optimizer`` is given.
        forget_optimizer: makes a separate optimizer for the forgetting steps (DualOptim).
        lr_schedule: ``cosine`` over ``steps`` for both kinds of step, or ``constant``.
        alpha: strength of the forgetting ascent; ``auto`` finds it in ``prepare``, see :meth:`prepare`.
        auto_alpha_steps: iterations of a trial run that ``auto`` probes a strength with.
        auto_alpha_target: the mean loss (nats) that the forget set should reach with ``auto``; by default that of the
            validation role, which the network was not trained on.
        schedule: how alpha falls: ``cosine``, ``linear``, ``expdecay`` or ``constant``.
        coefficients: ``adaptive`` sample weights, or ``uniform``.
        lam: exponent of the adaptive weights, in [0, 1].
        loss_floor: see :class:`~torchlethe.components.AdaptiveForgetLoss`.
        clip: largest norm of the masked forgetting gradient; ``inf`` never clips.
        mask: ``ratio`` of the two Fisher informations against gamma, ``top`` (the weights with the largest ratio),
            ``none``, or a function from both to a mask.
        gamma: threshold of the ratio.
        mask_fraction: share of the weights that a ``top`` mask keeps, in [0, 1].
        fisher: ``batch`` or ``sample``, see :class:`~torchlethe.components.DiagonalFisher`.
        fisher_augment: measure on shuffled, augmented batches as the official code does; it is then not reproducible
            across batch sizes.
        fisher_stride: use every so many-th remaining batch for its Fisher information; 1 uses all.
        fisher_chunk: samples whose gradients are held at once in ``sample`` mode.
        strict_mask: keep masked weights and their optimizer state exactly as they were in forgetting steps; weight
            decay and momentum would otherwise move them.
        slow_beta: share of the new weights in the slow update; 1 switches it off.
        slow_every: pull after each ``step``, or once a ``cycle`` of ``forget_every`` iterations.
        bn_forget: whether BatchNorm uses (and updates) its statistics from forget batches: ``train`` or ``eval``.
        cosine_every: log the cosine between forgetting and repair gradient every so many forgetting steps; 0 never.

    Attributes:
        alpha: the strength in use; NaN with ``auto`` until ``prepare`` has found it.
        alpha_trials: with ``auto`` the mean loss on the forget set after the trial of each strength.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        steps: int = 1500,
        forget_every: int = 5,
        optimizer: OptimizerFactory = default_optimizer,
        forget_optimizer: OptimizerFactory | None = None,
        lr_schedule: Literal["cosine", "constant"] = "cosine",
        alpha: float | Literal["auto"] = 25.0,
        auto_alpha_steps: int = 50,
        auto_alpha_target: float | None = None,
        schedule: Literal["cosine", "linear", "expdecay", "constant"] = "cosine",
        coefficients: Literal["adaptive", "uniform"] = "adaptive",
        lam: float = 0.5,
        loss_floor: float = 1e-6,
        clip: float = 7.0,
        mask: Literal["ratio", "top", "none"] | MaskRule = "ratio",
        gamma: float = 1.0,
        mask_fraction: float = 0.5,
        fisher: Literal["batch", "sample"] = "batch",
        fisher_augment: bool = False,
        fisher_stride: int = 1,
        fisher_chunk: int = 64,
        strict_mask: bool = False,
        slow_beta: float = 1.0,
        slow_every: Literal["step", "cycle"] = "step",
        bn_forget: Literal["train", "eval"] = "train",
        cosine_every: int = 0,
    ) -> None:
        check_at_least(1, steps=steps, forget_every=forget_every, auto_alpha_steps=auto_alpha_steps)
        check_at_least(1, fisher_stride=fisher_stride, fisher_chunk=fisher_chunk)
        check_at_least(0, cosine_every=cosine_every)
        if isinstance(alpha, str) and alpha != "auto":
            raise ValueError(f"alpha is '{alpha}', allowed are a number above 0 and auto.")
        self.auto_alpha = self.reads_ahead = alpha == "auto"
        if auto_alpha_target is not None and not self.auto_alpha:
            raise ValueError(f"auto_alpha_target is {auto_alpha_target}, but alpha is {alpha}: set alpha to auto.")
        level = 1.0 if auto_alpha_target is None else auto_alpha_target
        strength = START if alpha == "auto" else float(alpha)
        check_above(0, alpha=strength, clip=clip, auto_alpha_target=level)
        check_choice(("cosine", "constant"), lr_schedule=lr_schedule)
        check_choice(("adaptive", "uniform"), coefficients=coefficients)
        check_choice(("step", "cycle"), slow_every=slow_every)
        check_choice(("train", "eval"), bn_forget=bn_forget)
        if not callable(mask) and mask not in ("ratio", "top", "none"):
            raise ValueError(
                f"mask is '{mask}', allowed are ratio, top, none or a function of both Fisher informations."
            )
        check_within(0, 1, mask_fraction=mask_fraction)
        check_at_least(0, gamma=gamma)
        forget_schedule(schedule, 0.0)
        FastSlowUpdater([], slow_beta)
        self.steps = steps
        self.forget_every = forget_every
        self.optimizer = optimizer
        self.forget_optimizer = forget_optimizer
        self.lr_schedule = lr_schedule
        self.alpha = math.nan if self.auto_alpha else strength
        self.auto_alpha_steps = auto_alpha_steps
        self.auto_alpha_target = auto_alpha_target
        self.alpha_trials: dict[float, float] = {}
        self.schedule = schedule
        self.forget_loss = AdaptiveForgetLoss(lam if coefficients == "adaptive" else 0.0, loss_floor)
        self.clip = clip
        self.mask_rule = mask
        self.gamma = gamma
        self.mask_fraction = mask_fraction
        self.fisher = DiagonalFisher(fisher, fisher_chunk)
        self.fisher_stride = fisher_stride
        self.prepares_augmented = fisher_augment
        self.strict_mask = strict_mask
        self.slow_beta = slow_beta
        self.slow_period = 1 if slow_every == "step" else forget_every
        self.bn_forget = bn_forget
        self.cosine_every = cosine_every
        held_out = self.auto_alpha and auto_alpha_target is None
        self.feed = (InterleavedHeldOut if held_out else Interleaved)(every=forget_every, steps=steps)
        self.parameters: dict[str, nn.Parameter] = {}
        self.slow = FastSlowUpdater([], slow_beta)
        self.mask: SaliencyMask | None = None
        self.watch = self._new_watch()

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer, or two when the forgetting steps have their own; forgets what an earlier run found."""
        self.prepared, self.mask, self.watch = False, None, self._new_watch()
        self.alpha, self.alpha_trials = math.nan if self.auto_alpha else self.alpha, {}
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizers = [make(list(self.parameters.values())) for make in self._makers()]
        self.slow = FastSlowUpdater(self.parameters.values(), self.slow_beta)
        return self.optimizers

    def _new_watch(self) -> ForgetWatch:
        return ForgetWatch(-(-self.steps // self.forget_every), self.clip)

    def _makers(self) -> list[OptimizerFactory]:
        return [self.optimizer, *([self.forget_optimizer] if self.forget_optimizer else [])]

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure both Fisher informations and make the mask from them; with ``alpha="auto"`` find the strength.

        For the latter, the first ``auto_alpha_steps`` iterations are run with strengths that double (or halve) from 25
        until the loss on the forget set reaches the level of data that the network was not trained on, as it would be
        after retraining. Each trial starts from the same weights and random state, and leaves no trace. Its batches are
        those of ``loaders["steps"]`` (dicts by role, which a Trainer passes), else the roles' loaders over and over: in
        a plain loop these should be shuffled.

        Raises:
            ValueError: with ``auto``, the forget set holds whole classes, of which held-out data says nothing.
        """
        logs = self._make_mask(network, loaders)
        if self.auto_alpha:

            def trial(alpha: float) -> float:
                return self._trial(network, loaders, alpha)

            self.alpha, self.alpha_trials, found = find_strength(network, loaders, trial, self.auto_alpha_target)
            logs |= found
        return logs | super().prepare(network, loaders)

    def _make_mask(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        if self.mask_rule == "none":
            return {}
        forget = self.fisher.estimate(network, loaders["forget"])
        remain = self.fisher.estimate(network, islice(loaders["remain"], 0, None, self.fisher_stride))
        if callable(self.mask_rule):
            mask = self.mask_rule(forget, remain)
        elif self.mask_rule == "top":
            ratios = {name: saliency_ratio(value, remain[name]) for name, value in forget.items()}
            mask = SaliencyMask.from_top_fraction(ratios, self.mask_fraction)
        else:
            mask = SaliencyMask.from_ratio(forget, remain, self.gamma)
        self.mask = mask.like(self.parameters)
        kept = self.mask.kept_fraction()
        if not 0.01 <= kept <= 0.9:
            advice = "a smaller gamma lets more weights move" if kept < 0.01 else "a larger gamma protects more weights"
            warnings.warn(f"the saliency mask keeps {kept:.1%} of the weights; {advice}.", stacklevel=2)
        layers = {f"mask_kept/{name}": share for name, share in self.mask.kept_fractions().items()}
        return {"mask_kept_fraction": kept} | layers

    def _trial(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]], alpha: float) -> float:
        """The mean loss on the forget set after a trial run."""
        trial = copy.copy(self)
        trial.alpha, trial.prepared, trial.cosine_every, trial.watch = alpha, True, 0, self._new_watch()
        trial.optimizers = [make(list(self.parameters.values())) for make in self._makers()]
        trial.slow = FastSlowUpdater(self.parameters.values(), self.slow_beta)
        backward = averaged_backward(self.parameters.values())
        with restored(network):
            if not any(part.training for part in network.modules()):
                network.train()
            batches = loaders["steps"] if "steps" in loaders else in_pairs(loaders["forget"], loaders["remain"])
            for k, batch in enumerate(islice(batches, min(self.auto_alpha_steps, self.steps))):
                trial.step(network, batch, k, backward)
            loss, _ = mean_loss(network, loaders["forget"])
        return loss

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """One iteration: a forgetting step when it is due, a repair step, the slow update."""
        if not self.prepared:
            raise RuntimeError("SFRonUpdate.step came before configure(network) and prepare(network, loaders).")
        progress = k / self.steps
        self._set_learning_rates(progress)
        logs: dict[str, Tensor | float] = {"lr": self.optimizers[0].param_groups[0]["lr"]}
        forget_gradients: list[Tensor] = []
        if k % self.forget_every == 0:
            logs |= self._forget(network, batch["forget"], k, backward)
            if self.cosine_every and k % (self.cosine_every * self.forget_every) == 0:
                forget_gradients = self._gradients()
        logs |= self._repair(network, batch["remain"], backward)
        if forget_gradients:
            logs["gradient_cosine"] = nn.functional.cosine_similarity(
                torch.cat(forget_gradients), torch.cat(self._gradients()), dim=0
            )
        if (k + 1) % self.slow_period == 0 or k + 1 == self.steps:
            self.slow.pull()
        return logs

    def _gradients(self) -> list[Tensor]:
        return [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters.values()]

    def _set_learning_rates(self, progress: float) -> None:
        if self.lr_schedule == "constant":
            return
        factor = forget_schedule("cosine", progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def _forget(self, network: nn.Module, batch: Any, k: int, backward: Backward) -> dict[str, Tensor | float]:
        optimizer, strength = self.optimizers[-1], forget_schedule(self.schedule, k / self.steps)
        optimizer.zero_grad(set_to_none=True)
        with batch_norm_in_eval(network) if self.bn_forget == "eval" else nullcontext():
            logits, labels = logits_and_labels(network, batch)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        weights = self.forget_loss.weights(losses)
        weighted = self.forget_loss(losses, weights)
        backward(-self.alpha * strength * weighted)
        moved = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if self.mask:
            gradients: Any = [p.grad for p in moved.values()]
            torch._foreach_mul_(gradients, self.mask.select(moved))
        norm = nn.utils.clip_grad_norm_(moved.values(), self.clip)
        with self.mask.held(moved, optimizer) if self.mask and self.strict_mask else nullcontext():
            optimizer.step()
        with torch.no_grad():
            loss = losses.detach().mean()
            self.watch.add(k // self.forget_every, loss, norm)
            return {
                "forget_loss": loss,
                "forget_loss_weighted": weighted.detach(),
                "forget_weight_entropy": weight_entropy(weights),
                "forget_misclassified": (logits.argmax(1) != labels).float().mean(),
                "forget_gradient_norm": norm.detach(),
                "forget_clip_ratio": (self.clip / (norm.detach() + 1e-6)).clamp(max=1.0),
                "alpha": self.alpha * strength,
            }

    def _repair(self, network: nn.Module, batch: Any, backward: Backward) -> dict[str, Tensor | float]:
        optimizer = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(network, batch)
        backward(loss)
        optimizer.step()
        return {"remain_loss": loss.detach()}

    def finish(self, network: nn.Module) -> None:
        """Warn of signs that little was forgotten: no step was clipped, or the loss on forget batches did not rise."""
        self.watch.warn(f"raise alpha (now {self.alpha:g}) or lower forget_every (now {self.forget_every}).")

    def state_dict(self) -> dict[str, Any]:
        """Mask (one bit a weight), strength found, anchor of the slow update, and what :meth:`finish` judges."""
        return super().state_dict() | {
            "mask": self.mask.state_dict() if self.mask else None,
            "slow": self.slow.state_dict(),
            **self.watch.state_dict(),
            "alpha": self.alpha if self.auto_alpha and self.prepared else None,
            "alpha_trials": self.alpha_trials,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the mask goes to the device of the parameters."""
        super().load_state_dict(state)
        device = next(iter(self.parameters.values())).device
        saved = state["mask"]
        self.mask = SaliencyMask.from_state_dict(saved, device).like(self.parameters) if saved else None
        self.slow.load_state_dict(state["slow"])
        self.watch.load_state_dict(state, device)
        if self.auto_alpha:
            self.alpha_trials = dict(state.get("alpha_trials", {}))
            # what was saved of a run with a given strength has none to restore: then prepare again
            self.alpha = state["alpha"] if state.get("alpha") is not None else math.nan
            self.prepared = self.prepared and not math.isnan(self.alpha)
