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


class TinyColour(nn.Module):
    """The network of sep: CIFAR-10 statistics, conv-BN-ReLU, strided conv-BN-ReLU, mean over pixels, linear."""

    def __init__(self, widths: tuple[int, int] = (6, 8), num_classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.linear = nn.Linear(widths[1], num_classes)

    def double(self) -> TinyColour:
        """In double precision, with the statistics of the normalisation as they are written."""
        network = super().double()
        network.mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)[:, None, None]
        network.std = torch.tensor([0.2470, 0.2435, 0.2616], dtype=torch.float64)[:, None, None]
        return network

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean.to(image.dtype)) / self.std.to(image.dtype)
        hidden = torch.relu(self.bn1(self.conv1(image)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        return self.linear(hidden.mean((2, 3)))


def stacked_states(golden: Mapping[str, np.ndarray], prefix: str = "ckpt/") -> list[dict[str, Tensor]]:
    """State dicts out of arrays that hold one tensor for each checkpoint along their first axis."""
    stacked = tensors_under(golden, prefix)
    count = len(next(iter(stacked.values())))
    states = [{name: value[k].clone() for name, value in stacked.items()} for k in range(count)]
    for state in states:
        counters = {name.replace("running_mean", "num_batches_tracked") for name in state if "running_mean" in name}
        state.update({name: torch.tensor(1) for name in counters})
    return states
