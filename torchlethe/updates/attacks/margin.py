"""DF-UAP: margin losses between the attacked class and the strongest other one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import Margin, margin_loss
from torchlethe.updates.attacks.base import Labels, LossAttack, OptimizerFactory, attacked_classes


def df_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam with DF-UAP's rate, 0.005."""
    return Adam(parameters, lr=0.005)


class MarginAttack(LossAttack):
    """Push the logit of the attacked class below the largest other one, or that of the target above it.

    Zhang, Benz, Imtiaz, Kweon, "Understanding Adversarial Examples from the Mutual Influence of Images and
    Perturbations", CVPR 2020; github.com/phibenz/uap_virtual_data.pytorch. Works on proxy images of another data set.

    Args:
        target: class that all images shall get, None for an untargeted attack.
        kappa: κ ≥ 0, how far beyond the border the loss still falls.
        kind: ``bounded_neg`` for untargeted, ``bounded_fixed_ref``, ``bounded`` or ``logit`` for targeted attacks; by
            default the first or the second of these.
        labels: which classes an untargeted attack starts from: ``predicted`` or ``given`` with the data.
        optimizer: makes the optimizer.

    Raises:
        ValueError: ``kappa`` is negative, ``kind`` is unknown or does not fit ``target``.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        target: int | None = None,
        kappa: float = 10.0,
        kind: Margin | None = None,
        labels: Labels = "predicted",
        optimizer: OptimizerFactory = df_optimizer,
    ) -> None:
        check_at_least(0, kappa=kappa)
        if kind is not None:
            check_choice(get_args(Margin), kind=kind)
        if kind is not None and (kind == "bounded_neg") != (target is None):
            raise ValueError(f"kind is {kind!r}: bounded_neg is for untargeted, the others are for targeted attacks.")
        check_choice(get_args(Labels), labels=labels)
        super().__init__(optimizer)
        self.target, self.kappa, self.labels = target, kappa, labels
        self.reads_labels = labels == "given"
        self.kind: Margin = kind or ("bounded_neg" if target is None else "bounded_fixed_ref")

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The margin loss."""
        classes = attacked_classes(batch, self.labels)
        if self.target is not None:
            classes = torch.full_like(classes, self.target)
        return margin_loss(network(noise(batch["image"])).logits, classes, self.kappa, self.kind), {}
