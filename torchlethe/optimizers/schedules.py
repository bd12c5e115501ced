"""Learning-rate schedules over optimizer steps that torch lacks in one piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchlethe.arguments import check_above, check_at_least, check_within


def warmup_drop_factor(
    step: int, steps: int, warmup: int = 0, drops: Sequence[float] = (0.6, 0.8), factor: float = 0.1
) -> float:
    """Factor on the learning rate at an optimizer step: a linear start, then a fall behind each share of the run.

    During the warm-up the factor is step / warmup, so the first step has rate 0. Behind step ⌊share · steps⌋ the rate
    is multiplied by ``factor``; that step itself still has the rate before. So NatMU's code
    (https://github.com/ZhengbaoHe/NatMU) trains and retrains its networks.

    Args:
        step: number of the step, from 0.
        steps: steps of the run, the warm-up included.
        warmup: steps of the warm-up.
        drops: shares of the run, in (0, 1).
        factor: by which the rate falls.

    Returns:
        The factor, in [0, 1].

    Example:
        >>> [round(warmup_drop_factor(step, 10, warmup=2), 3) for step in (0, 1, 6, 7, 8, 9)]
        [0.0, 0.5, 1.0, 0.1, 0.1, 0.01]
    """
    if step < warmup:
        return step / warmup
    return float(factor ** sum(step > int(share * steps) for share in drops))


class WarmupDropLR(LambdaLR):
    """The schedule of :func:`warmup_drop_factor`, for ``lr_interval: step``.

    Args:
        optimizer: the optimizer whose rates are scheduled.
        steps: optimizer steps of the run, the warm-up included.
        warmup: steps of the warm-up, below ``steps``.
        drops: shares of the run, in (0, 1), behind which the rate falls.
        factor: by which it falls, above 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> WarmupDropLR(optimizer, steps=39100, warmup=782).get_last_lr()
        [0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        warmup: int = 0,
        drops: Sequence[float] = (0.6, 0.8),
        factor: float = 0.1,
    ) -> None:
        check_at_least(1, steps=steps)
        if not 0 <= warmup < steps:
            raise ValueError(f"warmup is {warmup}, it must lie in 0…{steps - 1}, below the steps of the run.")
        if bad := [share for share in drops if not 0 < share < 1]:
            raise ValueError(f"drops contains {bad[0]}, shares of the run must lie between 0 and 1.")
        check_above(0, factor=factor)
        super().__init__(optimizer, lambda step: warmup_drop_factor(step, steps, warmup, drops, factor))


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
        check_within(0, 1, start=start)
        check_above(0, gamma=gamma)
        self.warmup, self.milestones, self.gamma, self.start = warmup, list(milestones), gamma, start
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        rise = self.start + (1 - self.start) * step / self.warmup if step < self.warmup else 1.0
        return rise * self.gamma ** bisect_right(self.milestones, step)
