"""What is to be forgotten: requests, and the split of a training set that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from torchlethe.arguments import check_within
from torchlethe.data.hashing import generator_for
from torchlethe.data.images import ImageDataset


class ForgetRequest:
    """Base of all requests: chooses samples of a training set.

    Attributes:
        whole_class: True when the request means classes, so that it also divides a test set.
    """

    whole_class: bool = False

    def divides(self, dataset: ImageDataset) -> bool:
        """Whether the request also divides another data set than the training set, such as the test set."""
        return self.whole_class

    def mask(self, dataset: ImageDataset) -> Tensor:
        """(N,) bool, True where a sample of ``dataset`` is to be forgotten."""
        raise NotImplementedError

    def select(self, dataset: ImageDataset) -> Tensor:
        """Positions to forget.

        Args:
            dataset: The training set.

        Returns:
            (M,) int64 positions in ``dataset``, ascending, 0 < M < N.

        Raises:
            ValueError: If the request selects nothing, everything, or something that does not exist.
        """
        mask = self.mask(dataset)
        if not mask.any():
            raise ValueError(f"forget selects none of the {len(dataset)} training samples ({self!r}), but needs some.")
        if mask.all():
            raise ValueError(f"forget selects all {len(dataset)} training samples ({self!r}), but some must remain.")
        return mask.nonzero().flatten()


def _numbers(name: str, wanted: Sequence[int | str], names: Sequence[str] | None, count: int) -> list[int]:
    """Class numbers of classes that are given by number or by name."""
    numbers = []
    for item in wanted:
        number = names.index(item) if names is not None and isinstance(item, str) and item in names else item
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(f"{name} contains {item!r}, but must hold numbers from 0 to {count - 1} or names of them.")
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} is {list(wanted)}, but must not name a class twice.")
    if not numbers:
        raise ValueError(f"{name} is empty, but must name at least one class to forget.")
    return numbers


class ForgetClasses(ForgetRequest):
    """Forget all training samples of some classes (by the label they are trained with).

    Args:
        classes: Numbers or names of the classes.

    >>> from torchlethe.data import InMemoryImages
    >>> data = InMemoryImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 1, 0, 2], classes=["cat", "dog", "owl"])
    >>> ForgetClasses(["cat", 2]).select(data).tolist()
    [0, 2, 3]
    """

    whole_class = True

    def __init__(self, classes: list[int | str]) -> None:
        self.classes = [classes] if isinstance(classes, (int, str)) else list(classes)

    def __repr__(self) -> str:
        return f"ForgetClasses(classes={self.classes})"

    @override
    def mask(self, dataset: ImageDataset) -> Tensor:
        numbers = _numbers("classes", self.classes, dataset.classes, len(dataset.classes))
        return torch.isin(dataset.labels, torch.tensor(numbers))


class ForgetSubclasses(ForgetRequest):
    """Forget part of a class: all training samples of some subclasses (rockets out of vehicles).

    Args:
        subclasses: Numbers or names of the subclasses, which the data set must know (coarse CIFAR-100 does).
    """

    whole_class = True

    def __init__(self, subclasses: list[int | str]) -> None:
        self.subclasses = [subclasses] if isinstance(subclasses, (int, str)) else list(subclasses)

    def __repr__(self) -> str:
        return f"ForgetSubclasses(subclasses={self.subclasses})"

    @override
    def divides(self, dataset: ImageDataset) -> bool:
        return dataset.subclasses is not None

    @override
    def mask(self, dataset: ImageDataset) -> Tensor:
        if dataset.subclasses is None:
            raise ValueError(
                f"subclasses is {self.subclasses}, but this data set has no subclasses; use ForgetClasses."
            )
        names = dataset.subclass_names
        count = len(names) if names is not None else int(dataset.subclasses.max()) + 1
        return torch.isin(dataset.subclasses, torch.tensor(_numbers("subclasses", self.subclasses, names, count)))


class ForgetFraction(ForgetRequest):
    """Forget a random part of the training set: the first ⌊fraction · N⌋ entries of a seeded permutation.

    Args:
        fraction: Share in (0, 1).
        seed: Seed of the draw, apart from those of training and unlearning.

    Raises:
        ValueError: If ``fraction`` is out of range.
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        check_within(0, 1, "()", fraction=fraction)
        self.fraction, self.seed = fraction, seed

    def __repr__(self) -> str:
        return f"ForgetFraction(fraction={self.fraction}, seed={self.seed})"

    @override
    def mask(self, dataset: ImageDataset) -> Tensor:
        mask = torch.zeros(len(dataset), dtype=torch.bool)
        order = torch.randperm(len(dataset), generator=generator_for("forget set", self.seed))
        mask[order[: int(self.fraction * len(dataset))]] = True
        return mask


class ForgetIndices(ForgetRequest):
    """Forget given samples, named by their ``index``, the position in the original training set.

    Args:
        source: The indices, or a file that holds them: ``.npy`` (integers), ``.json`` (a list) or ``.txt`` (one a
            line).
    """

    def __init__(self, source: str | Path | list[int]) -> None:
        self.source = source

    def __repr__(self) -> str:
        if isinstance(self.source, (str, Path)):
            return f"ForgetIndices({str(self.source)!r})"
        return f"ForgetIndices({len(self.source)} indices)"

    def indices(self) -> Tensor:
        """Read the indices.

        Returns:
            (M,) int64.

        Raises:
            ValueError: If the file is missing, of another kind, or does not hold whole numbers.
        """
        values: Any = self.source
        if isinstance(values, (str, Path)):
            path = Path(values)
            if not path.is_file():
                raise ValueError(f"source is {str(path)!r}, but there is no such file.")
            try:
                if path.suffix == ".npy":
                    values = np.load(path, allow_pickle=False)
                elif path.suffix == ".json":
                    values = json.loads(path.read_text())
                elif path.suffix == ".txt":
                    values = [int(line) for line in path.read_text().split()]
                else:
                    raise ValueError(f"source is {str(path)!r}, but must end in .npy, .json or .txt.")
            except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
                raise ValueError(f"source is {str(path)!r}, but its content cannot be read: {error}.") from error
            except ValueError as error:
                if str(error).startswith("source"):
                    raise
                raise ValueError(f"source is {str(path)!r}, but must hold whole numbers only ({error}).") from error
        try:
            array = np.asarray(values)
        except ValueError:  # a ragged list
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"source is {self!r}, but must be a flat list of whole numbers.")
        return torch.from_numpy(array.astype(np.int64))

    def refuse_held_out(self, validation: ImageDataset) -> None:
        """Refuse indices that cannot be forgotten since they were held out of the training set.

        Args:
            validation: The samples that were held out, with indices of the same original training set.

        Raises:
            ValueError: If an index belongs to ``validation``.
        """
        wanted = self.indices()
        if len(held_out := wanted[torch.isin(wanted, validation.indices)]):
            raise ValueError(
                f"source names the index {int(held_out[0])}, but that sample was held out for validation and is "
                "never trained on; name training samples."
            )

    @override
    def mask(self, dataset: ImageDataset) -> Tensor:
        wanted = self.indices()
        if not len(wanted):
            raise ValueError("source holds no indices, but must name at least one sample to forget.")
        if len(wanted.unique()) < len(wanted):
            values, counts = wanted.unique(return_counts=True)
            raise ValueError(f"source names the index {int(values[counts > 1][0])} twice, but each must occur once.")
        if len(missing := wanted[~torch.isin(wanted, dataset.indices)]):
            raise ValueError(
                f"source names the index {int(missing[0])}, but the training set has {len(dataset)} samples "
                f"with indices from {int(dataset.indices.min())} to {int(dataset.indices.max())}."
            )
        return torch.isin(dataset.indices, wanted)


@dataclass(frozen=True, eq=False)
class ForgetSplit:
    """A training set divided into what is forgotten and what remains.

    Two splits are the same when their :attr:`hash` is: it covers which samples are in each part and what they are.

    Attributes:
        forget: (M,) int64 positions in the training set, ascending.
        remain: (N - M,) int64 positions, ascending.
        request: What was asked for, in words.
        hash: Sha256 (hex) over the original indices of both parts and the data set's fingerprint.
    """

    forget: Tensor
    remain: Tensor
    request: str
    hash: str

    @classmethod
    def create(cls, dataset: ImageDataset, request: ForgetRequest) -> ForgetSplit:
        """Divide a training set.

        Args:
            dataset: The training set.
            request: What to forget.

        Raises:
            ValueError: If the request does not fit the data set.
        """
        forget = request.select(dataset)
        keep = torch.ones(len(dataset), dtype=torch.bool)
        keep[forget] = False
        remain = keep.nonzero().flatten()
        digest = hashlib.sha256(dataset.fingerprint().encode())
        for positions in (forget, remain):
            digest.update(dataset.indices[positions].sort().values.numpy().tobytes() + b"|")
        return cls(forget, remain, repr(request), digest.hexdigest())

    def describe(self) -> dict[str, Any]:
        """Plain values for logs and files: ``request``, ``forget`` and ``remain`` (counts), ``hash``."""
        return {
            "request": self.request,
            "forget": len(self.forget),
            "remain": len(self.remain),
            "hash": self.hash,
        }
