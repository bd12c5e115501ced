"""How strongly to forget: probe a strength on short trial runs until the forget set looks like data never seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlethe.components import all_reduce_sum, eval_mode, restored, world_size
from torchlethe.components.distributed import all_reduce_sum_many
from torchlethe.data import PADDING_LABEL, Interleaved, model_input
from torchlethe.updates.base import logits_and_labels

START = 25.0
"""The strength that is tried first: SFRon's published one."""


@dataclass(frozen=True)
class InterleavedHeldOut(Interleaved):
    """The interleaved feed that also names the validation role, which is measured and never trained on."""

    @property
    def roles(self) -> frozenset[str]:
        """Forget, remain and validation."""
        return super().roles | {"validation"}

    def without(self, role: str) -> str | None:
        """What to tell a user whose data has no held-out part."""
        if role != "validation":
            return None
        return (
            "alpha is 'auto', which needs held-out images: set `validation` of the data that the original was trained "
            "on, or give auto_alpha_target, the loss that the forget set should reach."
        )


@torch.no_grad()
def mean_loss(network: nn.Module, batches: Iterable[Any]) -> tuple[float, set[int]]:
    """Mean cross-entropy over all samples of all ranks in eval mode, in nats, and the labels that occur.

    Args:
        network: maps images to logits; its mode is left as it was.
        batches: on the network's device; padding (label -100) does not count.

    Raises:
        ValueError: there are no samples.
    """
    sums: Tensor | None = None
    with eval_mode(network):
        for raw in batches:
            logits, labels = logits_and_labels(network, raw)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=PADDING_LABEL)
            counts = torch.bincount(labels[labels != PADDING_LABEL], minlength=logits.shape[1])
            found = torch.cat([loss.double().view(1), counts.double()])
            sums = found if sums is None else sums + found
    if sums is None:
        raise ValueError("the mean loss needs at least one batch, the loader gave none.")
    loss_, *per_class = all_reduce_sum(sums).tolist()
    if not sum(per_class):
        raise ValueError("the mean loss needs at least one sample, the loader gave only padding.")
    return loss_ / sum(per_class), {label for label, count in enumerate(per_class) if count}


def occurring(batches: Iterable[Any], classes: set[int]) -> set[int]:
    """Which of some classes occur in the batches of any rank; each rank reads on until it has seen all of them.

    Args:
        batches: on a rank's device.
        classes: labels, the same on every rank.
    """
    wanted = torch.tensor(sorted(classes))
    found = torch.zeros(len(wanted), dtype=torch.long)
    for raw in batches:
        labels = model_input(raw)["label"]
        wanted, found = wanted.to(labels.device), found.to(labels.device)
        found |= torch.isin(wanted, labels).long()
        if bool(found.all()):
            break
    return {label for label, count in zip(wanted.tolist(), all_reduce_sum(found).tolist(), strict=True) if count}


def averaged_backward(parameters: Iterable[nn.Parameter]) -> Callable[[Tensor], None]:
    """A backward pass for trial runs: it averages gradients over ranks itself and triggers no hook of DDP.

    Args:
        parameters: those that get a gradient.
    """
    trained = list(parameters)

    def backward(loss: Tensor) -> None:
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        used = [(p, g) for p, g in zip(trained, found, strict=True) if g is not None]
        ranks = world_size()
        reduced = all_reduce_sum_many([g for _, g in used])
        for (p, _), gradient in zip(used, reduced, strict=True):
            p.grad = gradient / ranks if ranks > 1 else gradient

    return backward


def geometric_probe(
    loss_of: Callable[[float], float], target: float, start: float, factor: float = 2.0, probes: int = 10
) -> tuple[float, dict[float, float]]:
    """The strength at which a loss that rises with it reaches a target, by trials at start · factor^n.

    The first trial decides whether to go up or down; the search ends when two neighbours lie on both sides of the
    target, and returns the strength between them at which the loss, taken as linear in the strength's logarithm, is the
    target. A trial whose loss is not finite counts as past the target.

    Args:
        loss_of: runs a trial with a strength.
        target: the loss to reach.
        start: the first strength, above 0.
        factor: ratio of neighbouring strengths, above 1.
        probes: trials at most, at least 2.

    Returns:
        The strength (the last one tried where the target lies outside of all trials) and the loss of each trial.

    Example:
        >>> strength, tried = geometric_probe(lambda s: s / 10, target=4.8, start=25.0)
        >>> round(strength, 1), tried
        (47.3, {25.0: 2.5, 50.0: 5.0})
    """

    def run(strength: float) -> float:
        loss = loss_of(strength)
        return math.inf if math.isnan(loss) else loss

    tried = {start: run(start)}
    upwards = tried[start] < target
    step = factor if upwards else 1 / factor
    last = start
    while len(tried) < probes:
        strength = last * step
        tried[strength] = run(strength)
        if (tried[strength] < target) != upwards:
            low, high = sorted((last, strength))
            if not math.isfinite(tried[high]):
                return low, tried
            share = (target - tried[low]) / (tried[high] - tried[low])
            return low * (high / low) ** share, tried
        last = strength
    return last, tried


def find_strength(
    network: nn.Module,
    loaders: Mapping[str, Iterable[Any]],
    trial: Callable[[float], float],
    target: float | None = None,
) -> tuple[float, dict[float, float], dict[str, float]]:
    """The strength that takes the loss on the forget set to the level of data that the network was not trained on.

    Args:
        network: the original network; everything about it is left as it was.
        loaders: forget and, without ``target``, remain and validation.
        trial: runs a trial with a strength, leaves no trace, and returns the mean loss on the forget set after it.
        target: the loss to reach in place of that of the validation role.

    Returns:
        The strength, the loss of each trial by its strength, and numbers worth logging.

    Raises:
        ValueError: there is no target and the forget set holds a whole class, of which held-out data says nothing.

    Note:
        Losses are those of all ranks, so all ranks find the same strength. Warns, and goes on, where the loss is at the
        target before the first step, or where no trial reaches it.
    """
    with restored(network):  # iterating over loaders draws from the random generators
        before, classes = mean_loss(network, loaders["forget"])
        if target is None:
            target, _ = mean_loss(network, loaders["validation"])
            if gone := sorted(classes - occurring(loaders["remain"], classes)):
                raise ValueError(
                    f"alpha is 'auto', but all of class {gone[0]} is to be forgotten, and held-out images of a class "
                    "that the original knows say nothing about its loss after retraining: give auto_alpha_target or a "
                    "number."
                )
    trials: dict[float, float] = {}
    strength = START
    if before >= target:
        warnings.warn(
            f"nothing to forget? the loss on the forget set is {before:.3g} before the first step, at least the "
            f"{target:.3g} that it should reach; alpha is set to {START:g}.",
            stacklevel=3,
        )
    else:
        strength, trials = geometric_probe(trial, target, START)
        if min(trials.values()) >= target or max(trials.values()) < target:
            too_weak = trials[strength] < target
            advice = "lower forget_every or raise the learning rate" if too_weak else "raise forget_every"
            warnings.warn(
                f"no strength from {min(trials):.3g} to {max(trials):.3g} brought the loss on the forget set to "
                f"{target:.3g}, alpha={strength:.3g} to {trials[strength]:.3g}; {advice}.",
                stacklevel=3,
            )
    logs = {f"auto_alpha_loss/{alpha:g}": loss for alpha, loss in trials.items()}
    return strength, trials, {"auto_alpha": strength, "auto_alpha_target": target, "auto_alpha_loss/0": before} | logs


def in_pairs(forget: Iterable[Any], remain: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Batches of both roles without end, each role read over and over."""
    return ({"forget": f, "remain": r} for f, r in zip(_endless(forget), _endless(remain), strict=True))


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches
