"""SPGD, also called SGD-UAP: steps along the sign of the batch gradient of a bounded cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlethe.arguments import check_above, check_choice
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.functional.universal import bounded_cross_entropy
from torchlethe.updates.attacks.base import Labels, LossAttack, attacked_classes


class SignDescent(Optimizer):
    """p ← p − lr · sign(gradient).

    Args:
        parameters: what to optimise.
        lr: the step, in the unit of the parameters.
    """

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, after the closure where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
        return loss


class SignGradient(LossAttack):
    """v ← proj(v + η·sign ∇_v mean_i min(CE(x_i + v, y_i), β)); with a target the sign is turned and y = t.

    Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal Adversarial Training", AAAI 2020;
    github.com/kenny-co/sgd-uap-torch.

    Args:
        target: class that all images shall get, None for an untargeted attack.
        step_size: η in units of ξ; 0.8 in their code, where it is constant.
        beta: β in nats, ``inf`` for none; 12 in their code for ImageNet.
        labels: which classes an untargeted attack starts from: ``predicted`` or ``given`` with the data.

    Raises:
        ValueError: ``step_size`` or ``beta`` is not positive.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        target: int | None = None,
        step_size: float = 0.8,
        beta: float = 12.0,
        labels: Labels = "predicted",
    ) -> None:
        check_above(0, step_size=step_size, beta=beta)
        if math.isinf(step_size):
            raise ValueError("step_size is infinite, it must be a finite number of radii.")
        check_choice(get_args(Labels), labels=labels)
        super().__init__()
        self.target, self.step_size, self.beta, self.labels = target, step_size, beta, labels
        self.reads_labels = labels == "given"

    def configure(self, noise: UniversalNoise) -> Optimizer:
        """Sign descent with the step η·ξ."""
        return SignDescent([noise.v], self.step_size * noise.xi)

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bounded cross-entropy, negative for an untargeted attack."""
        classes = attacked_classes(batch, self.labels)
        logits = network(noise(batch["image"])).logits
        if self.target is None:
            return -bounded_cross_entropy(logits, classes, self.beta), {}
        return bounded_cross_entropy(logits, torch.full_like(classes, self.target), self.beta), {}
