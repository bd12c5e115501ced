"""Autoregressive noise for 32×32 colour images: batched against pixel by pixel, in turn.

python benchmarks/autoregressive_noise.py
"""

from __future__ import annotations

import time

import torch

from torchlethe.functional.autoregressive import autoregressive_pattern, draw_kernels, l2_scaled


def loop_pattern(kernel: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The recursion pixel by pixel for one image, as in the published code."""
    pattern = start.clone()
    for channel in range(pattern.shape[0]):
        for i in range(2, pattern.shape[1]):
            for j in range(2, pattern.shape[2]):
                around = pattern[channel, i - 2 : i + 1, j - 2 : j + 1]
                pattern[channel, i, j] = (kernel[channel] * around).sum()
    return pattern


def main() -> None:
    """See the module's text."""
    generator = torch.Generator().manual_seed(0)
    kernels = draw_kernels(10, 3, generator) * 0.5
    start = torch.randn(512, 3, 36, 36, dtype=torch.float64, generator=generator)
    label = torch.arange(512) % 10
    times: dict[str, list[float]] = {"batched": [], "loop": []}
    for _ in range(3):
        begin = time.perf_counter()
        batched = l2_scaled(autoregressive_pattern(kernels, label, start), 1.0, 4)[0]
        times["batched"].append((time.perf_counter() - begin) / len(start))
        begin = time.perf_counter()
        single = torch.stack([loop_pattern(kernels[label[k]], start[k]) for k in range(4)])
        times["loop"].append((time.perf_counter() - begin) / 4)
    worst = (l2_scaled(single, 1.0, 4)[0] - batched[:4]).abs().max()
    fast, slow = (sorted(values)[1] for values in times.values())
    print(f"autoregressive, 32x32x3, per image: batched {1e3 * fast:.3f} ms, loop {1e3 * slow:.1f} ms, ", end="")
    print(f"{slow / fast:.0f} times as fast, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
