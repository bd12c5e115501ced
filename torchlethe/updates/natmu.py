"""NatMU: fine-tuning on the remaining data and on forget images into which remaining ones are mixed.

Source: He, Li, Cheng, Huang and Huang, TPAMI 2025, https://arxiv.org/abs/2405.15495; official code
https://github.com/ZhengbaoHe/NatMU. The defaults are the code's for CIFAR-10, VGG-16 and random samples, but for the
draw of partners, which is dealt instead of found by rejection: the same distribution, and it always ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torchlethe.arguments import check_choice
from torchlethe.components import all_reduce_mean, all_reduce_sum, eval_mode, gather_in_order
from torchlethe.data import Hybrids, ImageDataset, as_batch
from torchlethe.data.hashing import generator_for
from torchlethe.data.hybrids import shuffled
from torchlethe.functional.hybrids import MaskKind, cosine_factor
from torchlethe.functional.pairing import (
    deal_partners,
    redistribute_demand,
    rejection_partners,
    walk_demand,
    wrong_classes,
)
from torchlethe.models import head_of
from torchlethe.updates.base import LossUpdate, OptimizerFactory, logits_and_labels


def natmu_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """AdamW with the official settings for CIFAR-10; weight decay acts on all parameters, biases too."""
    return AdamW(parameters, lr=1e-3, weight_decay=2e-3)


_GUARD_BATCHES = 16  # of remaining images, on which the accuracy before unlearning is measured


class NatMUUpdate(LossUpdate):
    """The NatMU procedure; the arguments are those of :class:`torchlethe.lightning_modules.NatMU`.

    In a plain loop::

        rule = NatMUUpdate(delta=-0.1)
        loader = rule.feed.loader({"forget": forget_set, "remain": remain_set}.get, batch_size=128)
        rule.configure(network.train())
        rule.set_length(5 * len(loader), len(loader))
        rule.prepare(network, {"forget": forget_batches, "remain": remain_batches})
        for k, batch in enumerate(chain.from_iterable(loader for epoch in range(5))):
            rule.step(network, batch, k)

    Args:
        optimizer: makes the optimizer from the parameters.
        delta: offset of the masks, in [-1, 1]; larger forgets more.
        n_hybrids: hybrids n of each forget image.
        mask: ``tent``, ``linear``, ``constant`` or ``cutmix``.
        classes: which classes a forget image is mixed with: ``top``, ``confusion`` or ``random``.
        pairing: how partners are drawn: ``deal``, ``reject`` or ``walk``.
        redistribute: apply the official guard on demand before drawing.
        resample: draw new partners each epoch.
        init_linear: which linear layers are drawn anew after the classes are chosen: ``none``, ``head`` or ``all``.
        lr_schedule: ``cosine`` as published, ``cosine_from_full`` or ``constant``.
        augment_remain: augment remaining images.
        remain_fraction: share of the remaining images that an epoch reads.
        seed: seed of partners, random classes and new layers.
        collapse_guard: stop the run (``stopped`` becomes true) after an epoch in which the accuracy on remaining
            images, as trained on, was more than so many points below the original network's; None never stops.

    Raises:
        ValueError: an argument is out of range.
    """

    feed: Hybrids

    def __init__(
        self,
        optimizer: OptimizerFactory = natmu_optimizer,
        delta: float = -0.19,
        n_hybrids: int = 4,
        mask: MaskKind = "tent",
        classes: Literal["top", "confusion", "random"] = "top",
        pairing: Literal["deal", "reject", "walk"] = "deal",
        redistribute: bool = False,
        resample: bool = False,
        init_linear: Literal["none", "head", "all"] = "none",
        lr_schedule: Literal["cosine", "cosine_from_full", "constant"] = "cosine",
        augment_remain: bool = True,
        remain_fraction: float = 1.0,
        seed: int = 0,
        collapse_guard: float | None = None,
    ) -> None:
        if collapse_guard is not None and not 0 < collapse_guard <= 100:
            raise ValueError(f"collapse_guard is {collapse_guard}, it must lie in (0, 100] points, or be None.")
        check_choice(("top", "confusion", "random"), classes=classes)
        check_choice(("deal", "reject", "walk"), pairing=pairing)
        check_choice(("none", "head", "all"), init_linear=init_linear)
        check_choice(("cosine", "cosine_from_full", "constant"), lr_schedule=lr_schedule)
        if resample and pairing == "reject":
            raise ValueError("resample is set, but pairing is 'reject': new partners each epoch are dealt.")
        if redistribute and pairing == "walk":
            raise ValueError("redistribute is set, but pairing is 'walk', which never demands more than there is.")
        super().__init__(optimizer)
        self.classes, self.pairing, self.redistribute = classes, pairing, redistribute
        self.init_linear, self.lr_schedule, self.seed = init_linear, lr_schedule, seed
        self.feed = Hybrids(n_hybrids, delta, mask, resample, augment_remain, remain_fraction, seed)
        self.collapse_guard = collapse_guard
        self.hits = torch.zeros(2)
        self.accuracy_before = 0.0

    @property
    def reads(self) -> frozenset[str]:
        """Both roles: in training mixed into one data set, in preparation one by one."""
        return self.feed.roles

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer; forgets an earlier run's pairs."""
        self.prepared, self.feed.demand, self.feed.partners = False, None, None
        self.stopped, self.hits = False, torch.zeros(2)
        if self.init_linear == "head":
            head_of(network)  # says now, not after the ranking, that there is none
        return super().configure(network)

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Ask the network for each forget image's wrong classes, and draw the partners.

        Under DDP every rank asks about its share and all draw the same pairs.
        """
        scores, own = self._forget_logits(network, loaders["forget"])
        labels = stored_labels(loaders["remain"])
        demand = self._demand(scores, own, labels)
        generator = generator_for("hybrids", self.seed, 0)
        draw = rejection_partners if self.pairing == "reject" else deal_partners
        partners = draw(demand, labels, lambda cards: shuffled(cards, generator))
        wanted, supply = (torch.bincount(values, minlength=scores.shape[1]) for values in (demand, labels))
        again = int((wanted - supply).clamp_min(0).sum())
        if again > 0.05 * len(demand):  # a handful is normal and is logged
            warnings.warn(
                f"{again} of {len(demand)} hybrids use a remaining image again, since their class has too few.",
                stacklevel=2,
            )
        self.feed.pair(demand, partners)
        if self.collapse_guard is not None:
            self.accuracy_before = _accuracy(network, islice(loaders["remain"], _GUARD_BATCHES))
        if self.init_linear != "none":
            self._draw_linear_anew(network)
        self.prepared = True
        return {"hybrids": float(len(demand)), "hybrid_partners_used_again": float(again)}

    def _forget_logits(self, network: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and labels (N,) of the forget set in stored order, on the CPU."""
        found = []
        with eval_mode(network), torch.no_grad():
            for batch in batches:
                found.append(logits_and_labels(network, batch))
        if not found:
            raise ValueError("the forget set is empty: there is nothing to mix.")
        scores, labels = (gather_in_order(torch.cat(part)) for part in zip(*found, strict=True))
        scores, labels = scores.cpu(), labels.cpu()
        kept = labels >= 0
        return scores[kept], labels[kept]

    def _demand(self, scores: Tensor, own: Tensor, labels: Tensor) -> Tensor:
        """Class of each hybrid, (n · N,), image by image."""
        classes, count = scores.shape[1], self.feed.count
        supply = torch.bincount(labels, minlength=classes)
        if self.classes == "random":
            scores = torch.rand(scores.shape, generator=generator_for("hybrid classes", self.seed))
        elif self.classes == "confusion":
            sums = scores.new_zeros(classes, classes).index_add_(0, own, scores.softmax(1))
            scores = sums[own]
        if self.pairing != "walk":
            demand = wrong_classes(scores, own, supply > 0, count).flatten()
            if self.redistribute:
                generator = generator_for("hybrid demand", self.seed)
                demand = redistribute_demand(demand, labels, lambda spare: shuffled(spare, generator), classes)
            return demand
        candidates = (supply > 0).sum() - (supply[own] > 0).long()
        ranking = wrong_classes(scores, own, supply > 0, classes)
        # classes that come round again are no choice of their own: point them at an empty class
        repeated = torch.arange(classes) >= candidates[:, None]
        ranking = torch.where(repeated, classes + torch.arange(classes), ranking)
        walked = walk_demand(ranking, torch.cat([supply, torch.zeros_like(supply)]), count)
        top = wrong_classes(scores, own, supply > 0, count)
        return torch.where(walked < 0, top, walked).flatten()

    def _draw_linear_anew(self, network: nn.Module) -> None:
        layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
        generator = generator_for("linear layers", self.seed)
        with torch.no_grad():
            for layer in [head_of(network)] if self.init_linear == "head" else layers:
                weight = torch.empty(layer.weight.shape)
                layer.weight.copy_(nn.init.xavier_normal_(weight, gain=2**0.5, generator=generator))

    def _set_learning_rates(self, k: int) -> None:
        if self.lr_schedule == "constant":
            return
        factor = cosine_factor(k, self.required_length()[0], self.lr_schedule == "cosine")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy; logs that of remaining images and of hybrids apart (NaN where a batch has none)."""
        self._set_learning_rates(k)
        logits, labels = logits_and_labels(network, batch)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        with torch.no_grad():
            hybrid = batch["is_hybrid"].to(losses.dtype)
            count, plain = hybrid.sum(), losses.detach()
            logs: dict[str, Tensor | float] = {
                "remain_loss": (plain * (1 - hybrid)).sum() / (len(plain) - count),
                "hybrid_loss": (plain * hybrid).sum() / count,
                "hybrid_accuracy": ((logits.argmax(1) == labels) * hybrid).sum() / count,
                "lr": self.optimizers[0].param_groups[0]["lr"],
            }
            if self.collapse_guard is not None:
                right = ((logits.argmax(1) == labels) * (1 - hybrid)).sum()
                self.hits = self.hits.to(right) + torch.stack([right, len(plain) - count])
        return losses.mean(), logs

    def after_optimizer_step(self, k: int) -> None:
        """At the end of an epoch, see whether the network has collapsed."""
        if self.collapse_guard is None or (k + 1) % self.required_length()[1]:
            return
        right, seen = all_reduce_sum(self.hits).tolist()
        self.hits = torch.zeros_like(self.hits)
        accuracy = 100 * right / max(seen, 1)
        if accuracy < self.accuracy_before - self.collapse_guard:
            self.stopped = True
            warnings.warn(
                f"NatMU stopped after step {k + 1}: the accuracy on remaining images was {accuracy:.1f} % in this "
                f"epoch and {self.accuracy_before:.1f} % before unlearning, more than collapse_guard="
                f"{self.collapse_guard} points apart: lower the learning rate or delta.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Labels and partners of the hybrids; the masks follow from the arguments, later draws from the seed."""
        guard = {"hits": all_reduce_mean(self.hits), "accuracy_before": self.accuracy_before, "stopped": self.stopped}
        return super().state_dict() | {"demand": self.feed.demand, "partners": self.feed.partners} | guard

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        # a checkpoint from before the guard has none of its state
        self.hits, self.stopped = state.get("hits", torch.zeros(2)), state.get("stopped", False)
        self.accuracy_before = state.get("accuracy_before", 0.0)
        parts = [state[name] for name in ("demand", "partners")]
        self.feed.demand, self.feed.partners = (None if part is None else part.cpu() for part in parts)


def _accuracy(network: nn.Module, batches: Iterable[Any]) -> float:
    """Accuracy in percent in eval mode, over all ranks."""
    counts = torch.zeros(2)
    with eval_mode(network), torch.no_grad():
        for batch in batches:
            logits, labels = logits_and_labels(network, batch)
            right = (logits.argmax(1) == labels).sum()
            counts = counts.to(logits.device) + torch.stack([right, (labels >= 0).sum()])
    right, seen = all_reduce_sum(counts).tolist()
    return 100 * right / max(seen, 1)


def stored_labels(loader: Iterable[Any]) -> Tensor:
    """Labels of a loader's data in stored order, without reading images where its data set knows them.

    Args:
        loader: batches in stored order; under DDP each rank's share.

    Returns:
        (N,) int64 on the CPU, on every rank all of them.

    Raises:
        ValueError: there are none.
    """
    inner: Any = loader
    while not hasattr(inner, "dataset") and hasattr(inner, "loader"):
        inner = inner.loader
    dataset = getattr(inner, "dataset", None)
    if isinstance(dataset, ImageDataset):
        return dataset.labels
    found = [torch.as_tensor(as_batch(batch)["label"]).long() for batch in loader]
    if not found:
        raise ValueError("the remaining data is empty: there is nothing to mix in.")
    labels = gather_in_order(torch.cat(found)).cpu()
    return labels[labels >= 0]
