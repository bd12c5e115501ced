"""Label noise on training labels, so that memorisation becomes visible."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from torchlethe.arguments import check_choice
from torchlethe.data.hashing import generator_for


class LabelNoise:
    """Base of the two kinds of noise: which samples are hit is drawn here, what happens to them in :meth:`corrupt`.

    Args:
        fraction: Share of the samples that get a wrong label, in [0, 1]; exactly ``round(fraction · N)`` are drawn.
        seed: The noise is a pure function of (labels, fraction, seed).

    Raises:
        ValueError: If ``fraction`` is out of range.
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}, but label noise hits a share of the samples between 0 and 1.")
        self.fraction, self.seed = fraction, seed

    def corrupt(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
        """Wrong labels for the (M,) labels of the samples that were drawn."""
        raise NotImplementedError

    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return noisy labels.

        Args:
            labels: (N,) int64 in [0, num_classes).
            num_classes: Number of classes C.

        Returns:
            (N,) int64; ``labels`` is not changed.
        """
        generator = generator_for("label noise", self.seed)
        hit = torch.randperm(len(labels), generator=generator)[: round(self.fraction * len(labels))]
        noisy = labels.clone()
        noisy[hit] = self.corrupt(labels[hit], num_classes, generator)
        return noisy


class SymmetricNoise(LabelNoise):
    """Every wrong class is equally likely: ``(y + U{1, …, C-1}) mod C``.

    Args:
        fraction: Share of the samples that get a wrong label, in [0, 1].
        seed: Seed of the draw.

    >>> clean = torch.zeros(10, dtype=torch.int64)
    >>> int((SymmetricNoise(0.3)(clean, 4) != clean).sum())
    3
    """

    @override
    def corrupt(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, but symmetric noise needs at least 2.")
        return (labels + torch.randint(1, num_classes, labels.shape, generator=generator)) % num_classes


class AsymmetricNoise(LabelNoise):
    """Each class is mistaken for one other class.

    Args:
        fraction: Share of the samples that are drawn, in [0, 1]; those whose class has no entry in ``pairs`` keep it.
        pairs: From class to the class it is mistaken for; by default each for the next one, ``(y + 1) mod C``.
        seed: Seed of the draw.
        draw: ``hash`` draws like the other kinds; ``fsam`` takes the samples that nblt/F-SAM takes for that seed.

    >>> AsymmetricNoise(1.0, pairs={9: 1})(torch.tensor([9, 3]), 10).tolist()
    [1, 3]
    """

    def __init__(
        self,
        fraction: float,
        pairs: Mapping[int, int] | None = None,
        seed: int = 0,
        draw: Literal["hash", "fsam"] = "hash",
    ) -> None:
        super().__init__(fraction, seed)
        check_choice(("hash", "fsam"), draw=draw)
        self.draw = draw
        self.pairs = None if pairs is None else {int(key): int(value) for key, value in pairs.items()}

    @override
    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        if self.draw == "hash":
            return super().__call__(labels, num_classes)
        hit, _ = _fsam_draw(len(labels), self.fraction, self.seed)
        noisy = labels.clone()
        noisy[hit] = self.corrupt(labels[hit], num_classes, torch.Generator())
        return noisy

    @override
    def corrupt(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
        if self.pairs is None:
            return (labels + 1) % num_classes
        if bad := [c for pair in self.pairs.items() for c in pair if not 0 <= c < num_classes]:
            raise ValueError(f"pairs names the class {bad[0]}, but classes are 0…{num_classes - 1}.")
        table = torch.arange(num_classes)
        table[list(self.pairs)] = torch.tensor(list(self.pairs.values()), dtype=torch.int64)
        return table[labels]


class UniformNoise(LabelNoise):
    """Labels redrawn from all classes, the right one included, sample by sample as nblt/F-SAM does it.

    For the same seed, number of samples and classes the labels are those of its ``cifar_dataset``. As a redrawn label
    may be right, the share of wrong ones is about ``fraction · (1 - 1/C)``.

    Args:
        fraction: Share of the samples whose label is redrawn, in [0, 1]; ``int(fraction · N)`` of them.
        seed: Seed of the draw.

    >>> noisy = UniformNoise(0.5)(torch.zeros(1000, dtype=torch.int64), 10)
    >>> int((noisy != 0).sum())
    440
    """

    @override
    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        hit, generator = _fsam_draw(len(labels), self.fraction, self.seed)
        noisy = labels.clone()
        noisy[hit] = torch.tensor([generator.randint(0, num_classes - 1) for _ in range(len(hit))], dtype=labels.dtype)
        return noisy


def _fsam_draw(count: int, fraction: float, seed: int) -> tuple[Tensor, random.Random]:
    """The samples that nblt/F-SAM corrupts, in ascending order, and the generator as it stands after that."""
    generator = random.Random(seed)
    order = list(range(count))
    generator.shuffle(order)
    return torch.tensor(sorted(order[: int(fraction * count)]), dtype=torch.int64), generator
