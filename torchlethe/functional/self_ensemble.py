"""Self-ensemble protection (SEP).

Source: Chen et al., "Self-Ensemble Protection: Training Checkpoints Are Good Data Protectors", ICLR 2023; official code
Sizhe-Chen/SEP. Symbols: h_k the k-th of N checkpoints of one training run, φ_k(x) the input of its last linear layer,
g(y) the wrong class that images of class y are pushed to, ε the radius, α the step, both whole numbers in 1/255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def opposite_classes(num_classes: int) -> Tensor:
    """g(y) = (y + ⌊K/2⌋) mod K, the target classes of the official code.

    Args:
        num_classes: K, at least 2.

    Returns:
        (K,) int64.

    Raises:
        ValueError: there is no other class.

    >>> opposite_classes(10).tolist()
    [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, it must be at least 2: with one class there is no wrong one.")
    return (torch.arange(num_classes) + num_classes // 2) % num_classes


def checked_target_map(target: Sequence[int], num_classes: int) -> Tensor:
    """A user's own g: a permutation of the classes that leaves none in its place.

    Args:
        target: g(0), g(1), …, g(K-1).
        num_classes: K.

    Returns:
        (K,) int64.

    Raises:
        ValueError: it is no permutation, or a class is its own target.
    """
    if sorted(target) != list(range(num_classes)):
        raise ValueError(f"target is {list(target)}, it must name each class 0…{num_classes - 1} once.")
    if fixed := [label for label, other in enumerate(target) if label == other]:
        raise ValueError(f"target maps class {fixed[0]} to itself, every class needs another one.")
    return torch.tensor(list(target), dtype=torch.int64)


def equidistant(length: int, count: int) -> list[int]:
    """Choose checkpoints at equal distances that end with the last: ⌊k·L/N⌋ - 1 for k = 1…N.

    Where N divides L these are the official code's; elsewhere that code misses the end or covers a part of the run.

    Args:
        length: L, the number of checkpoints there are.
        count: N, how many to choose.

    Returns:
        N distinct positions, ascending.

    Raises:
        ValueError: N is below 1 or above L.

    >>> equidistant(120, 15)[:3], equidistant(120, 15)[-1], equidistant(12, 5)
    ([7, 15, 23], 119, [1, 3, 6, 8, 11])
    """
    if not 1 <= count <= length:
        raise ValueError(f"{count} checkpoints are asked for, there are {length}; allowed are 1…{length}.")
    return [k * length // count - 1 for k in range(1, count + 1)]


def pixel_step(image: Tensor, clean: Tensor, gradient: Tensor, step: int, radius: int) -> Tensor:
    """One descent step in whole numbers: Π(x - α·sign(∇)), Π the projection onto the ε-ball and the range of a byte.

    Images are bytes and ε, α whole numbers of 1/255, so all iterates are bytes: whole-number arithmetic is the float
    algorithm without its drift, and the result is stored as it is.

    Args:
        image: x, (B, C, H, W) int16 in 0…255.
        clean: x⁰, the same.
        gradient: ∇, (B, C, H, W) floating; only its sign matters, sign(0) = 0.
        step: α.
        radius: ε.

    Returns:
        (B, C, H, W) int16 in 0…255.

    >>> x = torch.tensor([[[[0, 100, 254]]]], dtype=torch.int16)
    >>> pixel_step(x, x, torch.tensor([[[[1.0, 0.0, -2.0]]]]), step=4, radius=2).tolist()
    [[[[0, 100, 255]]]]
    """
    moved = image - gradient.sign().to(torch.int16) * step
    return torch.maximum(torch.minimum(moved, clean + radius), clean - radius).clamp_(0, 255)


def wrong_class_loss(logits: Tensor, target: Tensor) -> Tensor:
    """SEP: cross-entropy of each image to its wrong class, ℓ_k(x) = CE(h_k(x), g(y)).

    Args:
        logits: (…, B, K); computed in float32 or better.
        target: g(y), (B,).

    Returns:
        (…, B), nats.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return -F.log_softmax(logits, -1).gather(-1, target.expand(logits.shape[:-1])[..., None])[..., 0]


def alignment_loss(features: Tensor, means: Tensor) -> Tensor:
    """SEP-FA: mean squared distance of each image's feature to its wrong class's mean, ‖φ_k(x) - μ_k[g(y)]‖² / d.

    Args:
        features: φ_k(x), (…, B, d); computed in float32 or better.
        means: μ_k[g(y)], of the same shape.

    Returns:
        (…, B).
    """
    features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    return (features - means).square().mean(-1)


def svre_direction(
    image: Tensor,
    gradients: Sequence[Tensor] | Tensor,
    draws: Sequence[int],
    gradient_of: Callable[[int, Tensor], Tensor],
    move: Callable[[Tensor, Tensor], Tensor],
    first_is_mean: bool = True,
) -> Tensor:
    """The inner loop of SEP-FA-VR: stochastic variance reduced ensemble, the running sum G of corrected gradients.

    The first inner gradient needs no evaluation: there x̃ = x, so that it is the mean over the checkpoints.

    Args:
        image: x.
        gradients: g_k = ∇ℓ_k(x) for all k, N tensors of the shape of ``image``.
        draws: the checkpoint drawn in each inner step, M numbers in 0…N-1.
        gradient_of: (k, x̃) to ∇ℓ_k(x̃).
        move: (x̃, G) to Π(x̃ - α·sign(G)).
        first_is_mean: leave the first evaluation out. False where ``gradient_of`` is another function than the one that
            gave ``gradients``, as in the official code, whose inner gradients aim at the last checkpoint's class means.

    Returns:
        G after the M inner steps, without a division by M (only its sign is used).
    """
    mean = sum(gradients[1:], gradients[0]) / len(gradients)
    total = mean.clone() if first_is_mean else torch.zeros_like(mean)
    for m, k in enumerate(draws):
        if m or not first_is_mean:
            image = move(image, total) if m else image
            total += gradient_of(k, image) - (gradients[k] - mean)
    return total


def gradient_cosines(gradients: Tensor) -> Tensor:
    """|cos| of the angle between the input gradients of each two checkpoints, for every image.

    Args:
        gradients: ∇ℓ_k(x), (N, B, …).

    Returns:
        (B, N, N) in [0, 1]; where a gradient is zero, 0.
    """
    rows = F.normalize(gradients.flatten(2), dim=-1).transpose(0, 1)
    return (rows @ rows.mT).abs()
