import math
import re

import pytest

from torchlethe.arguments import check_above, check_at_least, check_choice, check_within


def refused(sentence: str):
    return pytest.raises(ValueError, match=f"^{re.escape(sentence)}$")


def test_at_least() -> None:
    check_at_least(1, a=1, b=math.inf)
    with refused("b is 0, it must be at least 1."):
        check_at_least(1, a=1, b=0, c=-1)
    with refused("a is nan, it must be at least 0.5."):
        check_at_least(0.5, a=math.nan)


def test_above() -> None:
    check_above(0, a=1e-9, b=math.inf)
    with refused("b is 0, it must be above 0."):
        check_above(0, a=1, b=0)
    with refused("a is nan, it must be above 0."):
        check_above(0, a=math.nan)


@pytest.mark.parametrize("ends", ["[]", "(]", "[)", "()"])
def test_within(ends: str) -> None:
    check_within(0, 1, ends, a=0.5, b=1e-9)
    bounds = {0: ends[0] == "[", 1: ends[1] == "]"}
    for bound, belongs in bounds.items():
        if belongs:
            check_within(0, 1, ends, a=bound)
    for value in [-1e-9, 1.1, math.nan, *(bound for bound, belongs in bounds.items() if not belongs)]:
        with refused(f"b is {value}, it must lie in {ends[0]}0, 1{ends[1]}."):
            check_within(0, 1, ends, a=0.5, b=value)


def test_within_is_closed_by_default() -> None:
    check_within(-1, 1, a=-1, b=1)
    with refused("low is 2, it must lie in [-1, 1]."):
        check_within(-1, 1, low=2)


def test_choice() -> None:
    check_choice(("a", "b", None), first="a", second=None)
    with refused("second is 'd', allowed are a, b and None."):
        check_choice(("a", "b", None), first="a", second="d")
    with refused("size is 16, allowed are 8 and 32."):
        check_choice((8, 32), size=16)
    with refused("allowed is None, allowed is a."):
        check_choice({"a": 1}, allowed=None)
    with refused("a is nan, allowed are 1 and 2."):
        check_choice((1, 2), a=math.nan)
