"""MU-Mis: forget by lowering the input sensitivity that training on the forget set has raised; reads nothing else.

Source: Cheng et al., ICLR 2026, https://arxiv.org/abs/2402.15109. No official code could be obtained; where the
procedure is open (mode of BatchNorm, step size, how often to look, what to do when it collapses) the choices are ours
and documented with the arguments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_above, check_at_least, check_choice, check_within
from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many, gather_in_order
from torchlethe.components.double_backward import DoubleBackward
from torchlethe.components.forget_samples import ForgetSamples, sample_ids
from torchlethe.data import PADDING_LABEL, Single, model_input, random_bits
from torchlethe.functional.mean_loss import differentiable_twice
from torchlethe.functional.sensitivity import (
    has_recovered,
    hinge_weights,
    input_gradient,
    input_sensitivity,
    irrelevant_class,
    relative_learning_rate,
    sensitivity_gap,
    squared_norms,
)
from torchlethe.updates.base import Backward, OptimizerFactory, UpdateRule, plain_backward


def plain_sgd(parameters: Iterable[Any]) -> Optimizer:
    """SGD without momentum and weight decay; the relative step sets its learning rate."""
    return SGD(parameters, lr=1e-5)


class MUMisUpdate(UpdateRule):
    """The MU-Mis procedure; the arguments are those of :class:`torchlethe.lightning_modules.MUMis`.

    A step descends on the mean of ‖∇ₓf_c‖² - ‖∇ₓf_c'‖² over a forget batch. ``stopped`` becomes true, and further steps
    do nothing, once the irrelevant sensitivity has recovered from its dip (``stop_reason`` "recovered") or has risen
    past the guard (``stop_reason`` "guard"; the weights are then those of the last look that was within it).

    After ``load_state_dict`` call ``prepare`` again: the monitored images are read anew, what was measured is kept.

    Args:
        steps: most steps that a run takes.
        rho: share of the squared target sensitivity that the first step removes to first order, which sets the
            learning rate of plain SGD; None leaves the optimizer its own.
        optimizer: makes the optimizer.
        delta: threshold on the ratio of irrelevant sensitivity, now to before, from which a run may stop.
        min_dip: dip below 1 that the ratio must have shown before, in [0, 1]; 0 as published, 1 never stops.
        guard: ratio past which the run is taken back and stopped; ``inf`` leaves only the guard against non-finite
            values.
        monitor_every: steps between two looks at the ratio; by default a pass over the forget set, and at most 5.
        monitor_samples: most forget samples that are looked at.
        weighting: ``plain``, the published loss, or ``hinge``, which stops pushing a sample once it has got there.
        kappa: goal of ``hinge`` for the target sensitivity, as a multiple of the mean irrelevant one at the start.
        n_irrelevant: number K of other classes in a sample's loss, summed after squaring.
        irrelevant_sampling: ``uniform``, anew in each step; ``fixed``, the same in each step; ``top``, the largest
            other logits.
        bn_mode: ``eval``; or ``train``, where BatchNorm mixes the samples and the sensitivities are no longer theirs.
        fold_bn: use the exact short cuts of :class:`~torchlethe.components.double_backward.DoubleBackward`.
        seed: seed of the irrelevant classes.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        steps: int = 500,
        rho: float | None = 0.03,
        optimizer: OptimizerFactory = plain_sgd,
        delta: float = 1.0,
        min_dip: float = 0.02,
        guard: float = 1.25,
        monitor_every: int | None = None,
        monitor_samples: int = 512,
        weighting: Literal["plain", "hinge"] = "plain",
        kappa: float = 1.0,
        n_irrelevant: int = 1,
        irrelevant_sampling: Literal["uniform", "fixed", "top"] = "uniform",
        bn_mode: Literal["eval", "train"] = "eval",
        fold_bn: bool = True,
        seed: int = 0,
    ) -> None:
        check_at_least(1, steps=steps, monitor_samples=monitor_samples, n_irrelevant=n_irrelevant)
        check_at_least(1, monitor_every=1 if monitor_every is None else monitor_every)
        check_above(0, rho=1.0 if rho is None else rho, delta=delta, kappa=kappa)
        check_within(0, 1, min_dip=min_dip)
        if not guard > 1:
            raise ValueError(f"guard is {guard}, it must be above 1, the ratio at the start.")
        check_choice(("plain", "hinge"), weighting=weighting)
        check_choice(("uniform", "fixed", "top"), irrelevant_sampling=irrelevant_sampling)
        check_choice(("eval", "train"), bn_mode=bn_mode)
        self.steps = steps
        self.rho = rho
        self.optimizer = optimizer
        self.delta, self.min_dip, self.guard = delta, min_dip, guard
        self.monitor_every = monitor_every
        self.monitor_samples = monitor_samples
        self.weighting = weighting
        self.kappa = kappa
        self.n_irrelevant = n_irrelevant
        self.irrelevant_sampling = irrelevant_sampling
        self.bn_mode = bn_mode
        self.fold_bn = fold_bn
        self.seed = seed
        self.feed = Single("forget", augment=False)
        self.parameters: list[nn.Parameter] = []
        self._reset()

    def _reset(self) -> None:
        self.prepared, self.stopped, self.stop_reason = False, False, ""
        self.period = 0
        self.unseen = 0  # steps since the last look
        self.start: list[float] = []  # mean irrelevant and target sensitivity at w_0
        self.ratio_min = 1.0
        self.best: list[Tensor] = []
        self.goals: dict[str, Tensor] = {}
        self._short_cuts: DoubleBackward | None = None
        self._monitored: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters.

        Raises:
            ValueError: the weights are of half precision, or ``rho`` is to set the step of another optimizer than SGD.
        """
        self._reset()
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the network has no parameter that requires a gradient, so nothing can be unlearned.")
        if low := next((p.dtype for p in self.parameters if p.dtype not in (torch.float32, torch.float64)), None):
            raise ValueError(
                f"the weights are {str(low).removeprefix('torch.')}, MU-Mis needs float32 or float64 weights: "
                "differences of squared gradient norms do not survive half precision."
            )
        self.optimizers = [self.optimizer(self.parameters)]
        if self.rho is not None and not isinstance(self.optimizers[0], SGD):
            raise ValueError(
                f"rho sets the learning rate of SGD, the optimizer is {type(self.optimizers[0]).__name__}: "
                "give rho=None and a learning rate of its own."
            )
        return self.optimizers

    # --- preparation ----------------------------------------------------------------------------------------------

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Choose the monitored samples, measure both sensitivities at w_0 and from them the learning rate.

        Raises:
            ValueError: the forget set is empty, an operation of the network has no second derivative, or the loss does
                not depend on the weights.
        """
        samples = ForgetSamples(self.monitor_samples)
        hinged = self.weighting == "hinge"
        for raw in loaders["forget"]:
            batch = model_input(raw)
            if batch["label"].ndim != 1:
                raise ValueError(f"label has the shape {tuple(batch['label'].shape)}, MU-Mis needs one class a sample.")
            if hinged and "index" not in batch:
                raise ValueError("weighting is 'hinge', which remembers every sample: the batches must have an index.")
            samples.add(batch, keep_ids=hinged and not self.goals)
        samples.finish()
        self.period = self.monitor_every or min(5, samples.batches)
        if self.fold_bn and self.bn_mode == "eval":
            self._short_cuts = DoubleBackward(network, samples.example.to(self.parameters[0].dtype))
        with torch.no_grad(), differentiable_twice(network):
            self.num_classes = network(samples.example.to(self.parameters[0].dtype)).shape[1]
        if self.n_irrelevant >= self.num_classes:
            raise ValueError(f"n_irrelevant is {self.n_irrelevant}, there are {self.num_classes - 1} other classes.")
        self._monitored = [(image, label, self._fixed_classes(label, ids)) for image, label, ids in samples.chunks()]
        if self.start:
            self.prepared = True  # restored: what was measured at w_0 stays
            return {}
        self.start = self._look(network)
        self.best = [p.detach().clone() for p in self.parameters]
        if hinged:
            self._measure_goals(network, loaders["forget"], samples)
        rate = self._measure_rate(network, samples)
        irrelevant, target = self.start
        if target <= irrelevant:
            warnings.warn(
                f"nothing to forget? the true logit is no more sensitive to the forget images ({target:.3g}) than the "
                f"others are ({irrelevant:.3g}), as in a network that was not trained on them.",
                stacklevel=2,
            )
        self.prepared = True
        return {"mis/target_sens": target, "mis/irrelevant_sens": irrelevant, "mis/ratio": 1.0, "lr": rate}

    def _fixed_classes(self, label: Tensor, ids: Tensor) -> Tensor:
        """(B, K) other classes to monitor: all of them up to 10 classes, else 4 for each sample."""
        others = self.num_classes - 1
        count = others if self.num_classes <= 10 else 4
        order = random_bits(self.seed, -2, ids, others).argsort(dim=1, stable=True)[:, :count]
        return irrelevant_class(label.unsqueeze(1), order, self.num_classes)

    def _measure_goals(self, network: nn.Module, batches: Iterable[Any], samples: ForgetSamples) -> None:
        """Cache the sensitivities of all logits for every forget sample at w_0."""
        rows = []
        for raw in batches:
            image = model_input(raw)["image"]
            every = torch.arange(self.num_classes, device=image.device).expand(len(image), -1)
            with self._fast():
                rows.append(input_sensitivity(network, image, every))
        ids, label, table = (gather_in_order(t) for t in (samples.all_ids, samples.all_labels, torch.cat(rows)))
        real = label != PADDING_LABEL
        order = ids[real].argsort()
        label, table = label[real][order].unsqueeze(1), table[real][order]
        mean = (table.sum(1) - table.gather(1, label).squeeze(1)) / (self.num_classes - 1)
        self.goals = {"ids": ids[real][order], "target": self.kappa * mean, "irrelevant": self.delta * table}

    def _measure_rate(self, network: nn.Module, samples: ForgetSamples) -> float:
        """Set the learning rate; a dry run of the double differentiation besides."""
        totals: list[Tensor] = [torch.zeros_like(p) for p in self.parameters]
        totals.append(totals[0].new_zeros(3))
        for image, label, ids in samples.chunks():
            torch._foreach_add_(totals, self._sums(network, image, label, ids, -1))
        *gradients, (target, _, count) = all_reduce_sum_many(totals)
        (optimizer,) = self.optimizers
        if self.rho is not None:
            norm = torch.stack(torch._foreach_norm(gradients)).norm() / count
            rate = relative_learning_rate(self.rho, float(target / count), float(norm) ** 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
        return float(optimizer.param_groups[0]["lr"])

    # --- steps ----------------------------------------------------------------------------------------------------

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """One descent step, and a look at the ratio when it is due; nothing once the run has stopped.

        The gradients are computed and summed over ranks here, so ``backward`` is not called.
        """
        if not self.prepared:
            raise RuntimeError("MUMisUpdate.step came before configure(network) and prepare(network, loaders).")
        if self.stopped:
            return {}
        batch = model_input(batch["forget"] if isinstance(batch, dict) and set(batch) == {"forget"} else batch)
        sums = self._sums(network, batch["image"], batch["label"], sample_ids(batch), k)
        *gradients, (target, irrelevant, count) = all_reduce_sum_many(sums)
        torch._foreach_div_(gradients, count)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizers[0].step()
        self.unseen += 1
        logs: dict[str, Tensor | float] = {
            "forget_loss": (target - irrelevant) / count,
            "mis/target_squared": target / count,
            "mis/irrelevant_squared": irrelevant / count,
        }
        if (k + 1) % self.period == 0 or k + 1 == self.steps:
            logs |= self._judge(network)
        return logs

    def _sums(self, network: nn.Module, image: Tensor, label: Tensor, ids: Tensor, k: int) -> list[Tensor]:
        """Gradients of the loss summed over samples, zero where a weight has none; then both terms and the count."""
        with differentiable_twice(network), _train_norms(network, self.bn_mode == "train"):
            image = image.detach().to(self.parameters[0].dtype).clone().requires_grad_()
            with self._fast():
                logits = network(image)
            columns = self._other_classes(logits, label, ids, k).unbind(1)
            try:
                target = squared_norms(input_gradient(logits, image, label, create_graph=True))
                irrelevant = torch.stack(
                    [squared_norms(input_gradient(logits, image, c, create_graph=True)) for c in columns], dim=1
                )
                weights = self._weights(target, irrelevant, label, columns, ids)
                loss = sensitivity_gap(target, irrelevant, weights).sum()
                if k < 0:
                    self._visit_everything(loss)
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            except (RuntimeError, NotImplementedError) as error:
                if any(word in str(error) for word in _TWICE):
                    raise ValueError(
                        f"MU-Mis differentiates twice, which an operation of {type(network).__name__} does not support "
                        f"({str(error).splitlines()[0][:120]})."
                    ) from error
                raise
        terms = torch.stack([target.detach().sum(), irrelevant.detach().sum(), target.new_tensor(len(label))])
        return [*gradients, terms]

    def _visit_everything(self, loss: Tensor) -> None:
        """Go back to every leaf: on the way to the weights alone, operations that refuse would not be met."""
        kept = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # or the sum would be made in place
        loss.backward(retain_graph=True)
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            parameter.grad = gradient

    def _other_classes(self, logits: Tensor, label: Tensor, ids: Tensor, k: int) -> Tensor:
        """(B, K) distinct classes other than the label."""
        others = self.num_classes - 1
        if self.irrelevant_sampling == "top":
            hidden = logits.detach().scatter(1, label.unsqueeze(1), -math.inf)
            return hidden.topk(self.n_irrelevant, dim=1).indices
        moment = k if self.irrelevant_sampling == "uniform" else -1
        if self.n_irrelevant == 1:
            offset = random_bits(self.seed, moment, ids, 1)
        else:
            offset = random_bits(self.seed, moment, ids, others).argsort(dim=1, stable=True)[:, : self.n_irrelevant]
        return irrelevant_class(label.unsqueeze(1), offset, self.num_classes)

    def _weights(
        self, target: Tensor, irrelevant: Tensor, label: Tensor, columns: Iterable[Tensor], ids: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.weighting == "plain":
            return None, None
        row = torch.searchsorted(self.goals["ids"], ids).clamp_max(len(self.goals["ids"]) - 1)
        goals = torch.stack([self.goals["irrelevant"][row, column] for column in columns], dim=1)
        return hinge_weights(target, irrelevant, self.goals["target"][row], goals)

    @contextmanager
    def _fast(self) -> Iterator[None]:
        with self._short_cuts.active() if self._short_cuts is not None else nullcontext():
            yield

    # --- the stop rule --------------------------------------------------------------------------------------------

    def _look(self, network: nn.Module) -> list[float]:
        """Mean irrelevant and target sensitivity, unsquared, on the monitored samples of all ranks."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.parameters[0].device)
        for image, label, classes in self._monitored:
            with self._fast():
                norms = input_sensitivity(
                    network, image.to(self.parameters[0].dtype), torch.cat([label.unsqueeze(1), classes], dim=1)
                ).double()
            counts = norms.new_tensor([classes.numel(), len(label)])
            sums += torch.cat([norms[:, 1:].sum().view(1), norms[:, 0].sum().view(1), counts])
        irrelevant, target, pairs, count = all_reduce_sum(sums).tolist()
        return [irrelevant / pairs, target / count]

    def _judge(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Look at the ratio, keep or take back the weights, and decide whether to stop; the same on every rank."""
        irrelevant, target = self._look(network)
        ratio = irrelevant / self.start[0] if self.start[0] else math.inf
        self.unseen = 0
        if not (math.isfinite(target) and ratio <= self.guard and math.isfinite(ratio)):
            torch._foreach_copy_([p.data for p in self.parameters], self.best)
            self.stopped, self.stop_reason = True, "guard"
        else:
            torch._foreach_copy_(self.best, [p.data for p in self.parameters])
            self.ratio_min = min(self.ratio_min, ratio)
            if has_recovered(ratio, self.ratio_min, self.delta, self.min_dip):
                self.stopped, self.stop_reason = True, "recovered"
        return {
            "mis/target_sens": target,
            "mis/irrelevant_sens": irrelevant,
            "mis/ratio": ratio,
            "mis/ratio_min": self.ratio_min,
        }

    def finish(self, network: nn.Module) -> None:
        """Look once more if steps were taken since the last look; warn when the guard had to take weights back."""
        if self.prepared and self.unseen and not self.stopped:
            self._judge(network)
        if self.stop_reason == "guard":
            warnings.warn(
                f"the irrelevant sensitivity rose past {self.guard} times that at the start, the sign of a collapse: "
                "the weights of the last look before it were restored; with a smaller rho more looks come before it.",
                stacklevel=2,
            )

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was measured at w_0, the weights of the last good look, and where the stop rule stands.

        No images: which of them are monitored follows from the forget set.
        """
        return super().state_dict() | {
            "start": self.start,
            "ratio_min": self.ratio_min,
            "best": self.best,
            "goals": self.goals,
            "unseen": self.unseen,
            "stopped": self.stopped,
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; ``prepare`` has to follow, it reads the monitored images."""
        device = self.parameters[0].device
        self.start, self.ratio_min, self.unseen = list(state["start"]), state["ratio_min"], state["unseen"]
        self.best = [value.to(device) for value in state["best"]]
        self.goals = {name: value.to(device) for name, value in state["goals"].items()}
        self.stopped, self.stop_reason = state["stopped"], state["stop_reason"]
        self.prepared = False


_TWICE = ("differentiat", "derivative", "double backward", "once_differentiable")


@contextmanager
def _train_norms(network: nn.Module, active: bool) -> Iterator[None]:
    """BatchNorm in train mode inside the block, where ``active``; the caller restores the modes."""
    for part in network.modules() if active else ():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    yield
