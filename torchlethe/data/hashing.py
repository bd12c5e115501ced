"""Counter-based randomness: random numbers as a pure function of integers, with no generator state.

The mixer is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014; constants of variant 13 by D. Stafford), a bijection of the 64-bit integers whose output bits each depend
on all input bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The 64 bits of ``value`` read as a signed integer, as int64 tensors hold them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix_seed(*values: int) -> int:
    """Mix integers into one seed for ``torch.Generator.manual_seed``.

    Args:
        *values: Integers of any size, for example a user's seed and an epoch; their order matters.

    Returns:
        An integer in [0, 2**63).

    >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
    (True, False)
    """
    state = 0
    for value in values:
        state = (state + value + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _M1) & _MASK
        state = ((state ^ (state >> 27)) * _M2) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(purpose: str, *values: int) -> torch.Generator:
    """A generator whose stream depends on what it is for, as well as on the seed.

    Two draws over the same samples with the same seed must not agree: a forget set drawn like the label noise would
    consist of the noisy samples.

    Args:
        purpose: What is drawn, for example ``"label noise"``.
        *values: The user's seed, and whatever else the draw depends on.

    Returns:
        A seeded generator on the CPU.

    >>> first, second = (torch.randperm(9, generator=generator_for(name, 0)) for name in ("noise", "forget"))
    >>> torch.equal(first, second)
    False
    """
    return torch.Generator().manual_seed(mix_seed(*purpose.encode(), *values))


def _mix(x: Tensor) -> Tensor:
    # int64 multiplication wraps as uint64 does; `>>` keeps the sign, so the copies of the sign bit are masked away.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_M1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_M2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def random_bits(seed: int, epoch: Tensor | int, index: Tensor, streams: int) -> Tensor:
    """Random integers that depend on nothing but (seed, epoch, index, stream).

    Any split of the samples into batches, ranks or runs gives each sample the same numbers, on CPU and CUDA alike.

    Args:
        seed: Any integer.
        epoch: (B,) int64, the pass in which a sample is drawn; or one number for all.
        index: (B,) int64, the identity of a sample.
        streams: How many independent numbers each sample needs.

    Returns:
        (B, streams) int64, uniform over [0, 2**32).

    >>> zero = torch.zeros(2, dtype=torch.int64)
    >>> random_bits(7, zero, torch.tensor([4, 5]), 3).shape
    torch.Size([2, 3])
    """
    if isinstance(epoch, int):
        epoch = torch.full_like(index, epoch)
    key = _mix(_mix(epoch + _signed(mix_seed(seed) * 2 + 1)) + index + _signed(_GOLDEN))
    stream = torch.arange(1, streams + 1, device=key.device) * _signed(_GOLDEN)
    return (_mix(key[:, None] + stream) >> 32) & 0xFFFFFFFF


def random_normal(seed: int, epoch: Tensor | int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise for each sample, that depends on nothing but (seed, epoch, index).

    Args:
        seed: Any integer.
        epoch: (B,) int64, the pass in which a sample is drawn; or one number for all.
        index: (B,) int64, the identity of a sample.
        shape: Shape of the noise of one sample.

    Returns:
        (B, *shape) float32 on the device of ``index``; no value lies further out than 5.2.

    >>> noise = random_normal(0, 0, torch.arange(1000), (8,))
    >>> noise.shape, round(float(noise.std()), 1)
    (torch.Size([1000, 8]), 1.0)
    """
    bits = random_bits(seed, epoch, index, torch.Size(shape).numel())
    # 23 bits and the half step fit float32 exactly, so that the argument of erfinv never rounds to 1
    uniform = ((bits >> 9).float() + 0.5) * 2**-22 - 1
    return (torch.erfinv(uniform) * 2**0.5).view(len(index), *shape)
