"""Fisher forgetting: noise where the remaining data does not mind.

Source: Golatkar, Achille, Soatto, CVPR 2020, https://arxiv.org/abs/1911.04933; as coded in
https://github.com/OPTML-Group/Unlearn-Saliency (``fisher_new`` and the older ``fisher``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many
from torchlethe.components.sample_gradients import (
    expected_squared_gradients,
    per_sample_gradients,
    regrouped,
    trainable,
    zeros_like,
)
from torchlethe.data.hashing import generator_for
from torchlethe.functional.editing import empirical_noise_scale, fisher_noise_variance
from torchlethe.models import head_name
from torchlethe.updates.weight_editor import WeightEditor


class FisherForgettingUpdate(WeightEditor):
    """Add Gaussian noise to every weight, the larger the less the remaining data depends on it.

    Reads the remaining data only.

    Args:
        variant: ``fisher_new``, the Fisher information under the network's own predictions; or ``fisher``, the older
            empirical one of single samples.
        alpha: strength of the noise, at least 0. It has to be tuned.
        batch_size: samples whose gradients are averaged before they are squared (``fisher_new``).
        head_rule: what counts as the last layer: ``identified``, the classifier as
            :func:`torchlethe.models.head_name` finds it; ``as_coded``, every parameter whose first (``fisher``: last)
            dimension equals the number of classes, which also meets other layers.
        reset_classes: give the last layer's rows of classes without remaining samples mean 0 and variance 1e-4
            (``fisher_new``).
        seed: the noise is a function of it.
        chunk_size: gradients held at once: of samples (``fisher``) or of classes (``fisher_new``).

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP the Fisher information is that of one process with the joined batches (of ``batch_size`` over all
        ranks), and all ranks add the same noise.
    """

    def __init__(
        self,
        variant: Literal["fisher_new", "fisher"] = "fisher_new",
        alpha: float = 1e-6,
        batch_size: int = 32,
        head_rule: Literal["identified", "as_coded"] = "identified",
        reset_classes: bool = True,
        seed: int = 0,
        chunk_size: int = 16,
    ) -> None:
        super().__init__("remain")
        check_choice(("fisher_new", "fisher"), variant=variant)
        check_choice(("identified", "as_coded"), head_rule=head_rule)
        check_at_least(0, alpha=alpha)
        check_at_least(1, batch_size=batch_size, chunk_size=chunk_size)
        self.variant, self.alpha, self.batch_size = variant, alpha, batch_size
        self.head_rule, self.reset_classes, self.seed, self.chunk_size = head_rule, reset_classes, seed, chunk_size
        self.information: dict[str, Tensor] = {}
        self.counts: Tensor = torch.zeros(0)

    def measure(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure the Fisher information on the remaining data."""
        if self.head_rule == "identified":
            head_name(network)  # raises where there is none
        names = list(trainable(network))
        if self.variant == "fisher_new":
            batches = regrouped(loaders["remain"], self.batch_size)
            found, self.counts = expected_squared_gradients(network, batches, self.chunk_size)
        else:
            found = self._empirical(network, loaders["remain"])
        self.information = dict(zip(names, found, strict=True))
        return {}

    def _empirical(self, network: nn.Module, loader: Iterable[Any]) -> list[Tensor]:
        sums, count = zeros_like(trainable(network).values()), torch.zeros((), dtype=torch.long)
        for gradients, valid in per_sample_gradients(network, loader, self.chunk_size):
            # the published code adds the epsilon before squaring
            squares = [torch.tensordot(valid.to(g.dtype), (g + 1e-8).square(), 1) for g in gradients]
            torch._foreach_add_(sums, [s.to(total.dtype) for s, total in zip(squares, sums, strict=True)])
            count = count.to(valid.device) + valid.sum()
        samples = int(all_reduce_sum(count))
        if not samples:
            raise ValueError("the Fisher information needs at least one batch, the loader gave none.")
        sums = all_reduce_sum_many(sums)
        torch._foreach_div_(sums, samples)
        return sums

    def is_head(self, network: nn.Module, name: str, parameter: Tensor, classes: int) -> bool:
        """Whether a parameter counts as the last layer's."""
        if self.head_rule == "identified":
            return name.rsplit(".", 1)[0] == head_name(network)
        return parameter.shape[0 if self.variant == "fisher_new" else -1] == classes

    def noise_scales(self, network: nn.Module) -> dict[str, Tensor]:
        """Standard deviation of every weight's noise, by name, from what was measured."""
        # the older code compares with 10, whatever the number of classes; it meets the head's bias only
        classes = len(self.counts) if self.variant == "fisher_new" else 10
        scales = {}
        for name, information in self.information.items():
            last = self.is_head(network, name, information, classes)
            if self.variant == "fisher_new":
                scales[name] = fisher_noise_variance(information, self.alpha, last).sqrt()
            else:
                scales[name] = empirical_noise_scale(information, self.alpha, last)
        return scales

    @torch.no_grad()
    def edit(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Add the noise."""
        generator = generator_for("fisher noise", self.seed)
        scales, total = self.noise_scales(network), torch.zeros((), dtype=torch.float64)
        gone = (self.counts == 0).nonzero().flatten() if self.reset_classes else self.counts[:0].long()
        head = head_name(network) if len(gone) else ""
        for name, parameter in trainable(network).items():
            scale = scales[name].to(parameter)
            if head and name.rsplit(".", 1)[0] == head:
                parameter[gone] = 0
                scale[gone] = 1e-2
            # drawn on the CPU, so that every device and rank adds the same noise
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) * scale
            parameter.add_(noise)
            total = total.to(noise.device) + noise.double().square().sum()
        self.information = {}
        return {"edit_norm": total.sqrt()}
