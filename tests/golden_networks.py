"""The tiny networks that the golden arrays were made with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """conv-BN-ReLU, strided conv-BN-ReLU, mean over pixels, linear: the network of sfron_cls and mu_baselines."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(image)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        return self.fc(hidden.mean((2, 3)))


def tensors_under(golden: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The golden arrays whose names start with a prefix, as float64 tensors without it."""
    return {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in golden if name.startswith(prefix)}


def fixed_batches(images: Tensor, labels: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Consecutive slices in stored order, the last one short, as the official runs used."""
    return [
        {"image": image, "label": label} for image, label in zip(images.split(size), labels.split(size), strict=True)
    ]
