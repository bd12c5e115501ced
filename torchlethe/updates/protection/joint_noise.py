"""Noise that is learned together with a network: what EM and REM share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlethe.arguments import check_above, check_at_least
from torchlethe.components import eval_mode
from torchlethe.components.originals import randomised_copy
from torchlethe.functional.sign_descent import quantized
from torchlethe.updates.protection.base import Protection
from torchlethe.updates.protection.settings import check_radius, check_step, described
from torchlethe.updates.protection.whole_set import WholeSet, rows_of


class JointNoiseProtector(Protection):
    """Noise for each image (or class) that :meth:`prepare` learns together with a network; a look-up afterwards.

    The network that was handed over gives the architecture: a copy is initialised from the seed and trained in float32
    by SGD with momentum, so that the outcome is a function of the settings and the data. Every rank computes the same.

    Args:
        network: maps images in [0, 1] to logits.
        radius: ε in units of 1/255.
        step: α of the noise in units of 1/255.
        lr: learning rate of the network's SGD.
        momentum: its momentum.
        weight_decay: its weight decay.
        clip: largest norm of the network's gradient; 0 does not clip.
        batch_size: images of a training batch.
        search_batch_size: images whose noise is searched at a time (the outcome does not depend on it).
        seed: seed of weights, batches and noise.
    """

    def __init__(
        self,
        network: nn.Module,
        radius: int,
        step: float,
        lr: float,
        momentum: float,
        weight_decay: float,
        clip: float,
        batch_size: int,
        search_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_above(0, lr=lr)
        check_at_least(0, momentum=momentum, weight_decay=weight_decay, clip=clip)
        check_at_least(2, batch_size=batch_size)
        check_at_least(1, search_batch_size=search_batch_size)
        self.radius: int = check_radius(radius)
        self.step, self.lr, self.momentum, self.weight_decay = check_step(step), float(lr), momentum, weight_decay
        self.clip, self.batch_size, self.search_batch_size, self.seed = float(clip), batch_size, search_batch_size, seed
        self.networks = {"network": network}
        self.noise = torch.zeros(0, dtype=torch.int16)
        self.index = torch.zeros(0, dtype=torch.int64)

    # --- for subclasses -------------------------------------------------------------------------------------------

    def fresh_network(self, device: torch.device | str) -> nn.Module:
        """A copy to be trained, in float32, with weights drawn from the seed."""
        architecture = copy.deepcopy(self.networks["network"]).float()  # in double precision other weights are drawn
        return randomised_copy(architecture, self.seed).to(device).requires_grad_(True)

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD with the settings of the arguments."""
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def train_step(self, network: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, label: Tensor) -> None:
        """One SGD step on images in pixel units, in train mode.

        The images are what would be published: within the range of a byte.
        """
        network.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(image / 255), label).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        optimizer.step()

    def keep(self, noise: Tensor, index: Tensor) -> None:
        """Store noise, in units of 1/255, as whole numbers: (N, C, H, W) for sorted indices (N,), or a row a class."""
        small = torch.int8 if self.radius < 128 else torch.int16
        self.noise, self.index = noise.round().to(small), index
        self.prepared = True

    # --- Protection -----------------------------------------------------------------------------------------------

    def rows(self, label: Tensor, index: Tensor) -> Tensor:
        """Which row of the noise each image gets."""
        return rows_of(index, self.index)

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        if not self.prepared:
            raise RuntimeError("prepare() has to learn the noise before images are protected.")
        return quantized(image, self.noise[self.rows(label, index)].float())

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "step", "lr", "momentum", "weight_decay", "clip", "batch_size", "seed")

    def to(self, device: torch.device | str) -> Self:
        """See :meth:`Protection.to`."""
        self.noise, self.index = self.noise.to(device), self.index.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """The noise, int8 or int16 in units of 1/255, and the indices of its rows (none for rows of classes)."""
        return super().state_dict() | {"noise": self.noise, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Protection.load_state_dict`."""
        super().load_state_dict(state)
        self.noise, self.index = state["noise"], state["index"]


def input_gradient(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy with respect to images in pixel units."""
    image = image.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(image / 255), label, reduction="sum"), image)
    return gradient


@torch.no_grad()
def error_rate(network: nn.Module, data: WholeSet, noise: Tensor, rows: Tensor, size: int) -> float:
    """Share of images x + δ that the network, in eval mode, gets wrong.

    Args:
        network: the network.
        data: the images.
        noise: (M, C, H, W) in pixel units.
        rows: (N,) the row of ``noise`` of each image.
        size: images at a time.
    """
    wrong = torch.zeros((), dtype=torch.int64, device=data.index.device)
    with eval_mode(network):
        for part in data.rows(size):
            image = (data.image[part].float() + noise[rows[part]]).clamp_(0, 255)
            wrong += (network(image / 255).argmax(1) != data.label[part]).sum()
    return float(wrong) / len(data)
