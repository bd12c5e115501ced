"""Selective synaptic dampening (SSD) and its relatives without labels (LFSSD) and without threshold (ASSD).

Source: Foster, Schoepf, Brintrup, AAAI 2024, https://arxiv.org/abs/2308.07707; official code
https://github.com/if-loops/selective-synaptic-dampening.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.components import DiagonalFisher, all_reduce_sum
from torchlethe.components.sample_gradients import batch_gradients, output_norm, trainable, zeros_like
from torchlethe.data import PADDING_LABEL, model_input
from torchlethe.functional.editing import adaptive_level, dampening_factor, finite_percentile
from torchlethe.updates.weight_editor import WeightEditor


class SSDUpdate(WeightEditor):
    r"""Dampen the weights that matter more to the forget set than to the whole training set.

    Where :math:`i_f > \alpha\, i_D`, :math:`\theta \leftarrow \theta \cdot \min(\lambda\, i_D / i_f, 1)`.

    Args:
        alpha: the threshold; ``adaptive`` (ASSD) takes a percentile of the ratios i_f / i_D instead, chosen by the
            share of the forget set.
        lam: strength of the dampening, at least 0.
        importance: ``fisher``, squared gradients of the cross-entropy; or ``output_norm`` (LFSSD), absolute gradients
            of the squared length of the logits, which needs no labels.
        per_sample: square the gradients of single samples rather than of batch means, so that batch size and order do
            not matter; for ``fisher``.
        chunk_size: samples whose gradients are held at once with ``per_sample``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP importances are those of one process with the joined batches, and all ranks edit alike.
    """

    def __init__(
        self,
        alpha: float | Literal["adaptive"] = 10.0,
        lam: float = 1.0,
        importance: Literal["fisher", "output_norm"] = "fisher",
        per_sample: bool = False,
        chunk_size: int = 64,
    ) -> None:
        super().__init__("forget", "train")
        if isinstance(alpha, str):
            if alpha != "adaptive":
                raise ValueError(f"alpha is '{alpha}', allowed are a number of at least 0 and adaptive.")
        else:
            check_at_least(0, alpha=alpha)
        check_at_least(0, lam=lam)
        check_choice(("fisher", "output_norm"), importance=importance)
        if per_sample and importance == "output_norm":
            raise ValueError("per_sample is true, but output_norm averages over batches: set it false.")
        check_at_least(1, chunk_size=chunk_size)
        self.alpha, self.lam, self.importance = alpha, lam, importance
        self.fisher = DiagonalFisher("sample" if per_sample else "batch", chunk_size)
        self.threshold = float("nan")
        self.forget_importance: dict[str, Tensor] = {}
        self.full_importance: dict[str, Tensor] = {}

    def measure(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure both importances, and with ``adaptive`` the threshold."""
        forget, full = (_Counted(loaders[role]) for role in ("forget", "train"))
        self.forget_importance = self._importance(network, forget)
        self.full_importance = self._importance(network, full)
        if self.alpha == "adaptive":
            pairs = zip(self.forget_importance.values(), self.full_importance.values(), strict=True)
            ratios = torch.cat([(f / d).flatten() for f, d in pairs])
            level = adaptive_level(forget.samples(), full.samples())
            self.threshold = float(finite_percentile(ratios, level))
            return {"ssd_level": level, "ssd_alpha": self.threshold}
        self.threshold = float(self.alpha)
        return {}

    def _importance(self, network: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        if self.importance == "fisher":
            return self.fisher.estimate(network, batches)
        sums, count = zeros_like(trainable(network).values()), 0
        for gradients, samples in batch_gradients(network, batches, output_norm):
            torch._foreach_add_(sums, [(gradient / samples).abs() for gradient in gradients])
            count += 1
        if not count:
            raise ValueError("the importance needs at least one batch, the loader gave none.")
        torch._foreach_div_(sums, count)
        return dict(zip(trainable(network), sums, strict=True))

    @torch.no_grad()
    def edit(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Dampen; warn when nothing, or nearly everything, was chosen."""
        chosen, total = torch.zeros((), dtype=torch.float64), 0
        for name, parameter in trainable(network).items():
            forget, full = self.forget_importance[name], self.full_importance[name]
            factor = dampening_factor(forget, full, self.threshold, self.lam)
            parameter.mul_(factor.to(parameter.dtype))
            chosen = chosen.to(forget.device) + (forget > self.threshold * full).sum()
            total += parameter.numel()
        share = float(chosen) / total
        self.forget_importance, self.full_importance = {}, {}
        if share == 0 or share > 0.9:
            much = "no weight" if share == 0 else f"{share:.0%} of the weights"
            advice = "a smaller alpha dampens more" if share == 0 else "a larger alpha dampens fewer"
            warnings.warn(f"{type(self).__name__} chose {much} to dampen; {advice}.", stacklevel=2)
        return {"dampened_fraction": share}


class _Counted:
    """A loader that remembers how many samples it gave, over all ranks and without padding."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.seen = batches, torch.zeros((), dtype=torch.long)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            labels = model_input(batch)["label"]
            self.seen = self.seen.to(labels.device) + (labels != PADDING_LABEL).sum()
            yield batch

    def samples(self) -> int:
        """The number of samples that one pass gave."""
        return int(all_reduce_sum(self.seen))
