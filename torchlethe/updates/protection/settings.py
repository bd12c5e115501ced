"""What the baselines check about their settings and say about themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import distributed as dist

from torchlethe.updates.protection.base import Protection


def described(protection: Protection, *names: str) -> dict[str, Any]:
    """The method (the class without ``Protector``), its radius, and the attributes of these names as a plain dict."""
    method = type(protection).__name__.removesuffix("Protector")
    return {"method": method, "radius": protection.radius, **{name: getattr(protection, name) for name in names}}


def check_radius(radius: int) -> int:
    """Refuse a radius that is no whole number of 1/255 in 1…255."""
    if isinstance(radius, bool) or not isinstance(radius, int) or not 1 <= radius <= 255:
        raise ValueError(f"radius is {radius}, it must be a whole number in 1…255 (units of 1/255).")
    return radius


def check_step(step: float) -> float:
    """Refuse a step that is no positive number of 1/255, or so small that a fraction of the range must be meant."""
    if not step >= 0.05:
        raise ValueError(
            f"step is {step}, it must be at least 0.05, as its unit is 1/255 like radius's: 0.8 rather than 0.8/255."
        )
    return float(step)


@contextmanager
def progress(text: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show how far a long preparation is, on a terminal and on rank 0 only.

    Args:
        text: what is being done.
        total: how many times the callable will be called, with those of an earlier run.
        done: how many times an earlier run called it.

    Yields:
        A callable that moves the bar on by one, with a remark.
    """
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (first and console.is_terminal)) as bar:
        task = bar.add_task(text, total=total, completed=done)
        yield lambda remark: bar.update(task, advance=1, description=f"{text} {remark}".strip())


@contextmanager
def own_training_state(device: torch.device | str, seed: int) -> Iterator[None]:
    """For a training of its own: inside, torch's random numbers (dropout) depend on a seed alone.

    And everything is float32, whatever autocast or default type a Trainer's precision has set.
    """
    place, before = torch.device(device), torch.get_default_dtype()
    random_state = torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
    with random_state, torch.autocast(place.type, enabled=False):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
