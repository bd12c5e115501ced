"""The checkpoints' losses and input gradients, one checkpoint at a time or all as one model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from torchlethe.components.network_ensemble import NetworkEnsemble
from torchlethe.functional.self_ensemble import alignment_loss, wrong_class_loss
from torchlethe.models import features_and_logits


class EnsembleGradients:
    """Losses ℓ_k of the checkpoints h_k and their gradients with respect to the image.

    Attributes:
        network_ensemble: the checkpoints, giving features and logits.
        variant: whose loss.
        vectorised: whether all checkpoints run as one model where all are needed.
        fold: whether BatchNorm is folded into convolutions, once the first images show where.
        means: μ_k[c], (N, K, d), for the variants with feature alignment.
        overwritten: the BatchNorm statistics that the official code's first checkpoint has in its first step.
    """

    network_ensemble: NetworkEnsemble
    variant: str
    vectorised: bool = False
    fold: bool = True
    means: Tensor | None = None
    overwritten: dict[str, Tensor]
    _first: nn.Module | None = None
    _folded: bool = False

    @property
    def checkpoints(self) -> int:
        """N."""
        return len(self.network_ensemble)

    def _first_network(self) -> nn.Module:
        """The first checkpoint as it is on file, apart from the ensemble."""
        self.network_ensemble.weights(0)
        return copy.deepcopy(self.network_ensemble.holder)

    def _unit(self, image: Tensor) -> Tensor:
        """Bytes to floats in [0, 1], of the networks' precision and preferred memory layout."""
        unit = image.to(self.network_ensemble.dtype) / 255
        if self.fold and not self._folded:
            self.network_ensemble.weights(0)
            self.network_ensemble.fold(unit[:2])
            self._folded = True
        return unit.contiguous(memory_format=torch.channels_last) if unit.is_cuda else unit

    def _losses(self, k: int | None, outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """ℓ_k for each image; with k None for all checkpoints, (N, B)."""
        features, logits = outputs
        if self.variant == "sep":
            return wrong_class_loss(logits, target)
        assert self.means is not None
        means = self.means[:, target] if k is None else self.means[k][target]
        return alignment_loss(features, means)

    def gradient(
        self, k: int, x: Tensor, target: Tensor, means_of: int | None = None, t: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """∇ℓ_k(x) of each image, ℓ_k (B,), and whether h_k sees the wrong class (B,).

        Args:
            k: the checkpoint.
            x: (B, C, H, W) in 0…255, whole numbers.
            target: (B,) the wrong classes.
            means_of: take the class means of another checkpoint, as the official code does by mistake.
            t: the step, where the first one differs: the official code's first checkpoint then still has the BatchNorm
                statistics that the class means' pass left; from the second step on it is read anew.
        """
        unit = self._unit(x).requires_grad_(True)
        if self.overwritten and t == 0 and k == 0:
            if self._first is None:
                self._first = self._first_network().eval()
                self._first.load_state_dict(self.overwritten, strict=False)
            outputs = features_and_logits(self._first, unit)
        else:
            outputs = self.network_ensemble(k, unit)
        losses = self._losses(k if means_of is None else means_of, outputs, target)
        (gradient,) = torch.autograd.grad(losses.sum(), unit)
        return gradient, losses.detach(), outputs[1].detach().argmax(-1) == target

    def gradients(self, x: Tensor, target: Tensor, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, losses and matches of all N checkpoints: (N, B, C, H, W), (N, B), (N, B)."""
        if self.vectorised:
            unit = self._unit(x)
            unit = unit.expand(self.checkpoints, *unit.shape).clone().requires_grad_(True)
            outputs = self.network_ensemble.all(unit, each=True)
            losses = self._losses(None, outputs, target)
            (gradient,) = torch.autograd.grad(losses.sum(), unit)
            return gradient, losses.detach(), outputs[1].detach().argmax(-1) == target
        parts = [self.gradient(k, x, target, t=t) for k in range(self.checkpoints)]
        gradients, losses, matches = (torch.stack(part) for part in zip(*parts, strict=True))
        return gradients, losses, matches

    @torch.no_grad()
    def _look(self, x: Tensor, target: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, and how many checkpoints see the wrong and the true class, (B,) each."""
        unit, parts = self._unit(x), []
        for k in range(self.checkpoints):
            outputs = self.network_ensemble(k, unit)
            seen = outputs[1].argmax(-1)
            parts.append(torch.stack([self._losses(k, outputs, target).double(), seen == target, seen == label]))
        total = torch.stack(parts).sum(0)
        return total[0] / self.checkpoints, total[1], total[2]
