"""Time and peak memory of a call, on a CPU that other programs use too and on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Wall clock on a GPU; on a CPU its time, so that other programs on the machine do not count."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak(work: Work, device: torch.device) -> float:
    """MiB that one call needs at most beyond what was held before: of the allocator, on a CPU of resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = resident("VmRSS") if reset_peak() else float("nan")
    work()
    return (resident("VmHWM") - before) / 1024


def reset_peak() -> bool:
    """Give unused memory back and start a new peak; false where the system cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> float:
    """A line of /proc/self/status in KiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) for line in lines if line.startswith(name))
