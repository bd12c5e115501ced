"""Synthetic shortcuts (LSP): linearly separable patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from sklearn.datasets import make_classification
from torch import Tensor

from torchlethe.arguments import check_above, check_at_least
from torchlethe.data.hashing import mix_seed
from torchlethe.functional.patches import blocks, with_norm
from torchlethe.functional.sign_descent import quantized
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.settings import described
from torchlethe.updates.protection.whole_set import rows_of


class SyntheticShortcutProtector(Protection):
    """Add blocks of colour whose values form one normal cluster for each class; no network.

    Yu et al., "Availability Attacks Create Shortcuts", KDD 2022, dayu11/Availability-Attacks-Create-Shortcuts. The
    values come from scikit-learn's ``make_classification`` with informative features only, are repeated over blocks
    and scaled to L2 = ε·√d for d values of an image. The images of a class get the class's samples in the order of
    their index.

    Args:
        num_classes: K, at most 2 to the power of the number of blocks and channels.
        radius: ε of the norm in units of 1/255; no bound on single pixels.
        patch: side of the blocks in pixels.
        separation: ``class_sep`` of ``make_classification``.
        seed: seed of the samples.

    Raises:
        ValueError: an argument is out of range; in :meth:`prepare`, the images have too few blocks for the classes.
    """

    def __init__(
        self, num_classes: int, radius: float = 6.0, patch: int = 8, separation: float = 10.0, seed: int = 0
    ) -> None:
        super().__init__()
        check_at_least(2, num_classes=num_classes)
        check_at_least(1, patch=patch)
        check_above(0, radius=radius, separation=separation)
        self.num_classes, self.rms = num_classes, float(radius)
        self.patch, self.separation, self.seed = patch, float(separation), seed
        self.size: list[int] = []
        self.index = torch.zeros(0, dtype=torch.int64)
        self.values = torch.zeros(0)

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Draw the samples; of the data only labels, indices and the images' shape are read."""
        labels, indices = [], []
        for batch in data:
            self.size = list(batch["image"].shape[1:])
            labels.append(batch["label"].cpu())
            indices.append(batch["index"].cpu())
        if not labels:
            raise ValueError("data is empty, so there is nothing to prepare on.")
        self.index, order = torch.cat(indices).sort()
        label = torch.cat(labels)[order]
        channels, height, width = self.size
        shape = (-(-height // self.patch), -(-width // self.patch), channels)
        features = torch.Size(shape).numel()
        if features < 62 and self.num_classes > 2**features:
            raise ValueError(
                f"patch is {self.patch}, which leaves {features} values for images of {height}×{width} pixels with "
                f"{channels} channels, too few for {self.num_classes} classes: make the patches smaller."
            )
        counts = torch.bincount(label, minlength=self.num_classes)
        samples, classes = make_classification(
            n_samples=int(counts.max()) * self.num_classes,
            n_features=features,
            n_informative=features,
            n_redundant=0,
            n_repeated=0,
            n_classes=self.num_classes,
            n_clusters_per_class=1,
            class_sep=self.separation,
            flip_y=0.0,
            random_state=mix_seed(*b"synthetic shortcut", self.seed) % 2**32,
        )
        drawn, of_class = torch.from_numpy(samples).float(), torch.from_numpy(classes)
        self.values = torch.zeros(len(label), features, dtype=torch.float32)
        for number in range(self.num_classes):
            rows = (label == number).nonzero().flatten()
            self.values[rows] = drawn[of_class == number][: len(rows)]
        self.values = self.values.view(-1, *shape).permute(0, 3, 1, 2).contiguous()
        self.to(device)
        self.prepared = True
        return {}

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        if not self.prepared:
            raise RuntimeError("prepare() has to draw the patches before images are protected.")
        delta = blocks(self.values[rows_of(index, self.index)], (self.size[1], self.size[2]), self.patch)
        return quantized(image, with_norm(delta, self.rms * image[0].numel() ** 0.5))

    def bound(self) -> dict[str, Any]:
        """ε as the root mean square of the change: an L2 norm of ε·√d, whatever the size d of the images."""
        return {"norm": "rms", "value": self.rms}

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "num_classes", "rms", "patch", "separation", "seed")

    def to(self, device: torch.device | str) -> Self:
        """See :meth:`Protection.to`."""
        self.values, self.index = self.values.to(device), self.index.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """The values (N, C, h, w) of the blocks of each image, the indices (N,), and the images' shape."""
        return super().state_dict() | {"values": self.values, "index": self.index, "size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Protection.load_state_dict`."""
        super().load_state_dict(state)
        self.values, self.index, self.size = state["values"], state["index"], list(state["size"])
