"""A learning-rate schedule that PyTorch has only as a composition, which YAML cannot write."""

from __future__ import annotations

from bisect import bisect_right

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmMultiStep(LambdaLR):
    """Rise linearly for some steps, then fall by a factor at each milestone; stepped after each batch.

    Args:
        optimizer: the optimizer.
        warmup: steps from ``start`` times the learning rate to the whole; 0 for none.
        milestones: steps after which the rate is multiplied by ``gamma``, ascending.
        gamma: the factor.
        start: share of the learning rate at step 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> schedule = WarmMultiStep(optimizer, warmup=2, milestones=[3], start=0.5)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.05, 0.075, 0.1, 0.01, 0.01]
    """

    def __init__(
        self, optimizer: Optimizer, warmup: int, milestones: list[int], gamma: float = 0.1, start: float = 0.01
    ) -> None:
        if warmup < 0 or list(milestones) != sorted(milestones):
            raise ValueError(f"warmup is {warmup} and milestones {milestones}, but must be 0 or more, and ascending.")
        if not 0 <= start <= 1 or gamma <= 0:
            raise ValueError(f"start is {start} and gamma {gamma}, but must lie in [0, 1], and above 0.")
        self.warmup, self.milestones, self.gamma, self.start = warmup, list(milestones), gamma, start
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        rise = self.start + (1 - self.start) * step / self.warmup if step < self.warmup else 1.0
        return rise * self.gamma ** bisect_right(self.milestones, step)
