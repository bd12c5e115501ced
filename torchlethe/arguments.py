"""Checks of arguments, without PyTorch: a value that is not allowed is refused in one sentence that names it.

The values are given by the names of their arguments, several at once; the first that is wrong is the one named. NaN is
never allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal


def check_at_least(low: float, /, **values: float) -> None:
    """Refuse values below a limit.

    Args:
        low: the smallest allowed value.
        **values: the values, by the names of their arguments.

    Raises:
        ValueError: a value is below the limit, or NaN.

    Example:
        >>> check_at_least(1, batch_size=64, epochs=0)
        Traceback (most recent call last):
        ValueError: epochs is 0, it must be at least 1.
    """
    for name, value in values.items():
        if not value >= low:
            raise ValueError(f"{name} is {value}, it must be at least {low}.")


def check_above(low: float, /, **values: float) -> None:
    """Refuse values that are not above a limit.

    Args:
        low: the limit, itself not allowed.
        **values: the values, by the names of their arguments.

    Raises:
        ValueError: a value is the limit or below it, or NaN.

    Example:
        >>> check_above(0, lr=0.1, temperature=0.0)
        Traceback (most recent call last):
        ValueError: temperature is 0.0, it must be above 0.
    """
    for name, value in values.items():
        if not value > low:
            raise ValueError(f"{name} is {value}, it must be above {low}.")


def check_within(low: float, high: float, ends: Literal["[]", "(]", "[)", "()"] = "[]", /, **values: float) -> None:
    """Refuse values outside an interval.

    Args:
        low: where the interval begins.
        high: where it ends.
        ends: whether its ends belong to it, in the notation of mathematics: ``"(]"`` is without ``low``, with ``high``.
        **values: the values, by the names of their arguments.

    Raises:
        ValueError: a value lies outside, or is NaN.

    Example:
        >>> check_within(0, 1, fraction=1.5)
        Traceback (most recent call last):
        ValueError: fraction is 1.5, it must lie in [0, 1].
        >>> check_within(0, 1, "(]", ratio=0)
        Traceback (most recent call last):
        ValueError: ratio is 0, it must lie in (0, 1].
    """
    for name, value in values.items():
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} is {value}, it must lie in {ends[0]}{low}, {high}{ends[1]}.")


def check_choice(allowed: Iterable[object], /, **values: object) -> None:
    """Refuse values that are none of those allowed.

    Args:
        allowed: the allowed values, at least one.
        **values: the values, by the names of their arguments.

    Raises:
        ValueError: a value is none of them.

    Example:
        >>> check_choice(("batch", "epoch", "run"), redraw="batch", refresh="day")
        Traceback (most recent call last):
        ValueError: refresh is 'day', allowed are batch, epoch and run.
    """
    allowed = tuple(allowed)
    for name, value in values.items():
        if value not in allowed:
            *others, last = map(str, allowed)
            listed = f"are {', '.join(others)} and {last}" if others else f"is {last}"
            raise ValueError(f"{name} is {value!r}, allowed {listed}.")
