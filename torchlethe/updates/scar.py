"""SCAR: move forget features to the nearest other class, and keep the outputs on images from elsewhere.

Source: the official code, https://github.com/jbonato1/SCAR (Bonato et al.).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from torchlethe.arguments import check_above, check_at_least, check_within
from torchlethe.components.distributed import all_reduce_mean, all_reduce_sum, world_size
from torchlethe.data import PADDING_LABEL, Feed, PositionedLoader, RoleLoader, model_input
from torchlethe.functional import scar
from torchlethe.models import features_and_logits
from torchlethe.updates.base import LossUpdate, OptimizerFactory
from torchlethe.updates.originals import KeepsOriginal


def scar_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam with learning rate 5e-4, the lower end of what the official code uses."""
    return Adam(parameters, lr=5e-4)


@dataclass(frozen=True)
class ForgetAndSurrogate(Feed):
    """A forget and a surrogate batch at every step; an epoch is a pass over the longer, the shorter is cycled.

    The remaining data is named, for its statistics, and served to no step.

    Args:
        surrogate: data set of surrogate images, read by whole batches; None for loaders that bring them themselves.
    """

    surrogate: Any = field(default=None, compare=False, repr=False)

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return max(batches["forget"], batches["surrogate"])

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        steps = self.length(batches)
        return ({"forget": epoch * steps + k, "surrogate": epoch * steps + k} for k in range(steps))

    @override
    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        if self.surrogate is None:
            raise ValueError("SCAR has no surrogate images: give a data set of images from elsewhere.")
        parts = {"forget": role_set("forget"), "surrogate": self.surrogate}
        return RoleLoader(parts, _Served(self.surrogate), batch_size, seed, **kwargs)


@dataclass(frozen=True)
class _Served(ForgetAndSurrogate):
    """The same feed as its loader sees it: by what is in a step."""

    @property
    @override
    def roles(self) -> frozenset[str]:
        return frozenset({"forget", "surrogate"})


class SCARUpdate(KeepsOriginal, LossUpdate):
    r"""Minimise :math:`\lambda_1 \cdot` distance of forget features + :math:`\lambda_2 \cdot` KL on surrogate images.

    ``prepare`` takes mean and covariance of each class from the original's features of the *remaining* data: what the
    head reads, under Tukey's transform. A step sees a forget batch and a surrogate batch. Each forget image is drawn
    towards the class, other than its own, that its features are nearest to in the original network. A class that has
    fewer than two remaining samples is nobody's target.

    Args:
        surrogate: data set of surrogate images, read by whole batches (``__getitems__``); not needed in a loop that
            passes ``{"forget": …, "surrogate": …}`` itself.
        optimizer: makes the optimizer from the parameters.
        forget_weight: λ₁, above 0.
        retain_weight: λ₂, at least 0.
        temperature: T of the divergence, above 0.
        power: exponent of Tukey's transform, in (0, 1].
        gamma1: shrinkage towards the mean variance, at least 0.
        gamma2: shrinkage towards the mean covariance, at least 0.
        stop_accuracy: the run ends when a pass over the forget set, from the second on, finds an accuracy below it, in
            [0, 1]; 0 never ends it. Measured on the batches of the steps, before each.
        bn_mode: whether BatchNorm uses (and gathers) the statistics of forget and surrogate batches: ``train`` or
            ``eval``.

    Attributes:
        means: μ, ``(K, D)``, after :meth:`prepare`.
        inverses: Σ⁻¹, ``(K, D, D)``.
        known: ``(K,)`` bool, the classes with statistics.
        gone: ``(K,)`` bool, the classes without a remaining sample.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Sums for the statistics, and the number of surrogate images that count, are taken over all ranks. Statistics are
        not stored: a resumed run measures them again on the original network.
    """

    def __init__(
        self,
        surrogate: Any = None,
        optimizer: OptimizerFactory = scar_optimizer,
        forget_weight: float = 1.0,
        retain_weight: float = 5.0,
        temperature: float = 1.0,
        power: float = 0.5,
        gamma1: float = 3.0,
        gamma2: float = 3.0,
        stop_accuracy: float = 0.01,
        bn_mode: Literal["train", "eval"] = "eval",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        if bn_mode == "remain":
            raise ValueError("bn_mode is 'remain', allowed are train and eval, as no step sees remaining data.")
        check_above(0, forget_weight=forget_weight, temperature=temperature)
        check_at_least(0, retain_weight=retain_weight, gamma1=gamma1, gamma2=gamma2)
        check_within(0, 1, "(]", power=power)
        check_within(0, 1, stop_accuracy=stop_accuracy)
        self.forget_weight, self.retain_weight, self.temperature = forget_weight, retain_weight, temperature
        self.power, self.gamma1, self.gamma2 = power, gamma1, gamma2
        self.stop_accuracy = stop_accuracy
        self.feed = ForgetAndSurrogate(surrogate)
        self.means, self.inverses, self.known, self.gone = (torch.zeros(0) for _ in range(4))
        self.pass_length = 0
        self._restart()

    def _restart(self) -> None:
        self.stopped, self.hits, self.batches, self.passes = False, torch.zeros(2), 0, 0

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters, and the original network."""
        self.prepared = False
        self._restart()
        self.place_original(network)
        return super().configure(network)

    def set_passes(self, batches: Mapping[str, int]) -> None:
        """The batches of a pass over the forget set say when ``stop_accuracy`` is looked at."""
        self.pass_length = batches["forget"]

    def _features(self, network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        """Transformed features ``(B, D)`` and logits ``(B, K)``, in at least float32."""
        features, logits = (
            value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
            for value in features_and_logits(network, image)
        )
        with torch.autocast(image.device.type, enabled=False):
            return scar.tukey(features, self.power), logits

    @torch.no_grad()
    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Measure mean and inverse correlation of each class of the remaining data.

        Raises:
            ValueError: no class has remaining samples enough to draw the forget samples to.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        for raw in loaders["remain"]:
            batch = model_input(raw)
            features, logits = self._features(self.original, batch["image"])
            real = batch["label"] != PADDING_LABEL
            parts.append((features[real], batch["label"][real]))
            classes = logits.shape[1]
        if not parts:
            raise ValueError("the remaining data is empty, but SCAR needs its statistics.")
        features, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        with torch.autocast(features.device.type, enabled=False):
            counts, sums = (all_reduce_sum(t) for t in scar.class_sums(features, labels, classes))
            self.means = sums / counts.clamp_min(1)[:, None]
            scatter = all_reduce_sum(scar.class_scatter(features, labels, self.means))
            covariance = scatter / (counts - 1).clamp_min(1)[:, None, None]
            self.inverses = scar.inverse_correlation(covariance, self.gamma1, self.gamma2)
        self.known, self.gone = counts >= 2, counts == 0
        asked = torch.zeros_like(counts)
        for raw in loaders["forget"]:
            label = model_input(raw)["label"]
            asked += torch.bincount(label[label != PADDING_LABEL], minlength=classes)
        asked = all_reduce_sum(asked) > 0
        known = self.known.nonzero().flatten().tolist()
        if not known or (len(known) == 1 and asked[known[0]]):
            raise ValueError(
                f"the classes with two or more remaining samples are {known}, but SCAR draws every forget sample to "
                "another class than its own."
            )
        return super().prepare(network, loaders)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """λ₁ · mean distance to the nearest other class + λ₂ · mean divergence on the surrogate images that count."""
        if not self.prepared:
            raise RuntimeError("SCARUpdate.step came before configure(network) and prepare(network, loaders).")
        forget, surrogate = model_input(batch["forget"]), model_input(batch["surrogate"])
        label = forget["label"]
        with torch.no_grad():
            # one pass of the original over both batches: in eval mode samples do not meet
            before, teacher = self._features(self.original, torch.cat([forget["image"], surrogate["image"]]))
        with self.batch_norm(network):
            features, own = self._features(network, forget["image"])
            _, student = self._features(network, surrogate["image"])
        with torch.autocast(features.device.type, enabled=False):
            with torch.no_grad():
                distances = scar.mahalanobis_form(before[: len(label)], self.means, self.inverses)
                target = scar.nearest_other_class(distances, label, self.known)
            distances = scar.mahalanobis_form(features, self.means, self.inverses)
            distance = distances.gather(1, target[:, None]).mean()
            losses, counts = scar.surrogate_divergence(student, teacher[len(label) :], self.gone, self.temperature)
            # ranks may drop different numbers of images: the mean is over all of them
            divergence = losses.sum() * world_size() / all_reduce_sum(counts.sum()).clamp_min(1)
            loss = self.forget_weight * distance + self.retain_weight * divergence
        with torch.no_grad():
            right = (own.argmax(1) == label).sum()
            self.hits = self.hits.to(right.device) + torch.stack([right, right.new_tensor(len(label))])
            self.batches += 1
            return loss, {
                "forget_loss": nn.functional.cross_entropy(own.detach(), label),
                "forget_distance": distance.detach(),
                "surrogate_divergence": divergence.detach(),
                "surrogate_kept": counts.float().mean(),
            }

    def after_optimizer_step(self, k: int) -> None:
        """After each pass over the forget set but the first, see whether it is forgotten."""
        if not self.stop_accuracy or not self.pass_length or self.batches < self.pass_length:
            return
        right, seen = all_reduce_sum(self.hits).tolist()
        self.passes += 1
        self.hits, self.batches = torch.zeros_like(self.hits), 0
        self.stopped = self.passes > 1 and right < self.stop_accuracy * seen

    def state_dict(self) -> dict[str, Any]:
        """The original's hash and the count of hits; statistics are measured again."""
        counters = {"hits": all_reduce_mean(self.hits), "batches": self.batches, "passes": self.passes}
        return super().state_dict() | self.original_state() | counters | {"prepared": False, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.check_original(state)
        super().load_state_dict(state)
        self.hits, self.batches, self.passes = state["hits"], state["batches"], state["passes"]
        self.stopped = state["stopped"]
