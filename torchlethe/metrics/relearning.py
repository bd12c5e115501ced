"""How many steps of fine-tuning on the forget set bring its accuracy back: the procedure, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchlethe.arguments import check_at_least, check_choice, check_within
from torchlethe.data.hashing import generator_for
from torchlethe.functional.relearning import Criterion, has_relearned

CHUNK = 512  # samples per forward of a check


@dataclass(frozen=True)
class RelearningSettings:
    """How relearning is measured; all models of a comparison need the same.

    Attributes:
        margin: how far from the original's level counts as back: points of accuracy, or nats of loss.
        lr: learning rate of plain SGD.
        momentum: its momentum.
        batch_size: forget samples per step.
        max_steps: where to stop; a model that is not back by then gets this number.
        every: steps between two checks. The result is a multiple of it.
        samples: at most so many forget samples are held in memory, fine-tuned on and judged; a random choice of a
            larger forget set.
        criterion: ``accuracy`` or ``loss`` of these samples.
        seed: seed of that choice and of the order of samples.
    """

    margin: float = 5.0
    lr: float = 0.01
    momentum: float = 0.0
    batch_size: int = 64
    max_steps: int = 200
    every: int = 1
    samples: int = 1024
    criterion: Criterion = "accuracy"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(("accuracy", "loss"), **{"relearning.criterion": self.criterion})
        counts = ("batch_size", "max_steps", "every", "samples")
        check_at_least(1, **{f"relearning.{name}": getattr(self, name) for name in counts})
        check_within(0, math.inf, "()", **{"relearning.lr": self.lr})
        check_within(0, 1, "[)", **{"relearning.momentum": self.momentum})
        check_within(0, math.inf, "[)", **{"relearning.margin": self.margin})


@dataclass(frozen=True)
class Relearning:
    """What came out.

    Attributes:
        steps: optimizer steps until the level was back, 0 for a model that never lost it; ``max_steps`` if it never
            came back.
        reached: whether it came back.
        curve: the level at the start and after each check, percent or nats.
    """

    steps: int
    reached: bool
    curve: tuple[float, ...]


def choose_samples(count: int, settings: RelearningSettings) -> Tensor:
    """Which forget samples take part.

    Args:
        count: size of the forget set.
        settings: of which ``samples`` and ``seed`` count.

    Returns:
        (min(count, samples),) int64 positions, ascending; a pure function of the arguments.

    Example:
        >>> choose_samples(3, RelearningSettings(samples=5))
        tensor([0, 1, 2])
    """
    if count <= settings.samples:
        return torch.arange(count)
    chosen = torch.randperm(count, generator=generator_for("relearning samples", settings.seed))
    return chosen[: settings.samples].sort().values


def relearn(
    forward: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    images: Tensor,
    labels: Tensor,
    target: float,
    settings: RelearningSettings | None = None,
    device: torch.device | None = None,
) -> Relearning:
    """Fine-tune on forget samples by SGD on the cross-entropy until their accuracy (or loss) is back at a level.

    The order of the samples is a new permutation in each pass, a function of (seed, pass). The parameters are changed
    in place, so pass those of a copy. Modes are the caller's business: in eval mode dropout and batch statistics play
    no part, and the result is a pure function of weights, samples and settings.

    Args:
        forward: maps images (B, …) to logits (B, K) by way of ``parameters``.
        parameters: what is fine-tuned; those that ``forward`` does not use stay as they are.
        images: (N, …) forget samples, on any device; batches are moved.
        labels: (N,) int64.
        target: of :func:`~torchlethe.functional.relearning.relearning_target`.
        settings: the procedure; its defaults where nothing is given.
        device: where ``forward`` works; that of the first parameter by default.

    Returns:
        Steps, whether the level is back, and the levels on the way. A model whose loss is no longer finite does not
        come back.

    Note:
        Works in this process alone: under DDP run it on one rank with all samples.

    Raises:
        ValueError: there are no samples or no parameters, or the sizes differ.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1] * 4)
        >>> relearn(layer, list(layer.parameters()), x, y, 100.0).steps
        1
    """
    settings = settings or RelearningSettings()
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"relearning needs as many labels as images, got {len(labels)} and {len(images)}.")
    weights = [p for p in parameters if p.requires_grad and p.is_floating_point()]
    if not weights:
        raise ValueError("relearning needs at least one parameter that takes a gradient.")
    place = device or weights[0].device
    optimizer = torch.optim.SGD(weights, lr=settings.lr, momentum=settings.momentum)
    curve = [_level(forward, images, labels, settings.criterion, place)]
    if has_relearned(curve[0], target, settings.criterion):
        return Relearning(0, True, tuple(curve))
    step = passes = 0
    while True:
        order = torch.randperm(len(images), generator=generator_for("relearning order", settings.seed, passes))
        passes += 1
        for rows in order.to(images.device).split(settings.batch_size):
            with torch.enable_grad():
                loss = cross_entropy(forward(images[rows].to(place)), labels[rows].to(place))
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            last = step == settings.max_steps
            if step % settings.every and not last:
                continue
            curve.append(_level(forward, images, labels, settings.criterion, place))
            if has_relearned(curve[-1], target, settings.criterion):
                return Relearning(step, True, tuple(curve))
            if last or math.isnan(curve[-1]):
                return Relearning(settings.max_steps, False, tuple(curve))


@torch.no_grad()
def _level(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, criterion: Criterion, device: torch.device
) -> float:
    parts = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for image, label in parts:
        logits = forward(image.to(device)).cpu().double()
        if not bool(logits.isfinite().all()):
            return math.nan
        if criterion == "accuracy":
            total += 100.0 * (logits.argmax(dim=1) == label.cpu()).sum()
        else:
            total += cross_entropy(logits, label.cpu(), reduction="sum")
    return float(total) / len(images)
