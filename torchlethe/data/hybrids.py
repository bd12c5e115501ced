"""NatMU's training set: the remaining images and, beside them, forget images mixed with remaining ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from torchlethe.arguments import check_at_least, check_within
from torchlethe.data.hashing import generator_for
from torchlethe.data.images import ImageDataset
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.roles import Feed
from torchlethe.data.samplers import PositionedSampler, epoch_order
from torchlethe.functional.hybrids import MASKS, MaskKind, blend, hybrid_masks
from torchlethe.functional.pairing import deal_partners


class Hybrids(Feed):
    """Shuffled batches of the union of the remaining data and ``count`` hybrids for each forget image.

    Who is mixed with whom is known only once the network has been asked (:class:`~torchlethe.updates.NatMUUpdate`): the
    loader may be made before :meth:`pair`, but not read.

    Args:
        count: Hybrids n for each forget image; hybrid k of an image uses mask ``k % 4``.
        delta: Offset of the masks, see :func:`torchlethe.functional.hybrids.hybrid_masks`.
        mask: Kind of the masks.
        resample: Draw new partners each epoch, instead of once.
        augment_remain: Augment remaining images; hybrids never are.
        remain_fraction: Share of the remaining images that one epoch reads, in (0, 1]; another part each epoch.
        seed: Seed of what is drawn anew each epoch.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        count: int = 4,
        delta: float = 0.0,
        mask: MaskKind = "tent",
        resample: bool = False,
        augment_remain: bool = True,
        remain_fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least(1, n_hybrids=count)
        check_within(0, 1, "(]", remain_fraction=remain_fraction)
        if not -1 <= delta <= 1:
            raise ValueError(f"delta is {delta}, it must lie in [-1, 1]: beyond, a hybrid is one of its two images.")
        hybrid_masks(delta, 2, kind=mask)
        self.count, self.delta, self.mask, self.resample = count, float(delta), mask, resample
        self.augment_remain, self.remain_fraction, self.seed = augment_remain, remain_fraction, seed
        self.demand: Tensor | None = None
        self.partners: Tensor | None = None

    def pair(self, demand: Tensor, partners: Tensor) -> None:
        """Say which hybrids there are.

        Args:
            demand: (L,) int64, label of each hybrid, image by image (L is ``count`` times the forget images).
            partners: (L,) int64, positions in the remaining set of the images mixed in.
        """
        self.demand, self.partners = demand, partners

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches["hybrids"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        start = epoch * batches["hybrids"]
        return ({"hybrids": start + step} for step in range(batches["hybrids"]))

    @override
    def loader(
        self, role_set: Callable[[str], ImageDataset], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader:
        """A loader over the union, for any loop.

        Args:
            role_set: Gives the data set of the roles ``forget`` and ``remain``.
            batch_size: Samples per batch and rank.
            seed: Order seed, equal on all ranks.
            **kwargs: Rank and number of ranks, and further arguments of ``torch.utils.data.DataLoader``.

        Returns:
            Batches of ``image``, ``label``, ``index``, ``epoch``, ``is_hybrid`` and ``augment``, all of length B.
        """
        union = HybridDataset(role_set("forget"), role_set("remain"), self)
        sampler = PassSampler(union, kwargs.pop("num_replicas", None), kwargs.pop("rank", None), True, seed)
        return PositionedLoader(union, batch_size, sampler=sampler, **kwargs)


class PassSampler(PositionedSampler):
    """A :class:`PositionedSampler` whose positions carry the pass, as ``pass * size + position``."""

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + position for position in super().__iter__())


class HybridDataset(Dataset[Any]):
    """The union of the remaining images (first) and the hybrids, blended when a batch is read.

    Nothing is stored but positions: a batch is two reads and one blend, on the device of the images. uint8 images are
    blended as published; images of a foreign data set as that data set's transform leaves them.

    Args:
        forget: Data set with ``__getitems__`` of the images to be forgotten.
        remain: Likewise of the remaining ones, with ``labels``.
        plan: Says which hybrids there are.
    """

    def __init__(self, forget: ImageDataset, remain: ImageDataset, plan: Hybrids) -> None:
        self.forget, self.remain, self.plan = forget, remain, plan
        self.plain = max(1, round(plan.remain_fraction * len(remain)))
        self._drawn: tuple[int, Tensor] | None = None
        self._masks: Tensor | None = None

    def __len__(self) -> int:
        return self.plain + self.plan.count * len(self.forget)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """Read a whole batch.

        Args:
            positions: (B,) positions as :class:`PassSampler` gives them; below the size they are those of pass 0.

        Returns:
            ``image`` (B, C, H, W), ``label`` (B,), ``index`` (B,) (of a hybrid, that of its forget image),
            ``is_hybrid`` (B,) bool and ``augment`` (B,) bool.
        """
        asked = torch.as_tensor(positions, dtype=torch.int64)
        number = int(asked[0]) // len(self)
        asked = asked % len(self)
        is_hybrid = asked >= self.plain
        plain, hybrid = asked[~is_hybrid], asked[is_hybrid] - self.plain
        if self.plain < len(self.remain):
            plain = epoch_order(len(self.remain), self.plan.seed, number)[plain]
        batch = self.remain.__getitems__(torch.cat([plain, self.partners(number)[hybrid]]))
        if len(hybrid):
            forget = self.forget.__getitems__(hybrid // self.plan.count)
            image, count = batch["image"], len(plain)
            mixed = blend(image[count:], forget["image"], self.masks(image)[hybrid % self.plan.count % MASKS])
            batch["image"] = torch.cat([image[:count], mixed])
            batch["index"] = torch.cat([batch["index"][:count], forget["index"]])
        back = torch.cat([(~is_hybrid).nonzero(), is_hybrid.nonzero()]).flatten().argsort()
        batch = {name: batch[name][back.to(batch[name].device)] for name in ("image", "label", "index")}
        return {**batch, "is_hybrid": is_hybrid, "augment": ~is_hybrid & self.plan.augment_remain}

    def partners(self, number: int) -> Tensor:
        """Positions (L,) in the remaining set of the images that are mixed in, in a pass."""
        demand, partners = self.plan.demand, self.plan.partners
        if demand is None or partners is None:
            raise RuntimeError("the hybrids are not paired yet: NatMUUpdate.prepare(network, loaders) comes first.")
        if len(demand) != self.plan.count * len(self.forget):
            raise ValueError(
                f"{len(demand)} hybrids were paired, but {self.plan.count} for each of {len(self.forget)} forget "
                "images are to be read: prepare with the same forget set."
            )
        if not self.plan.resample or number == 0:
            return partners
        if self._drawn is None or self._drawn[0] != number:
            generator = generator_for("hybrids", self.plan.seed, number)
            drawn = deal_partners(demand, self.remain.labels, lambda cards: shuffled(cards, generator))
            self._drawn = (number, drawn)
        return self._drawn[1]

    def masks(self, image: Tensor) -> Tensor:
        """The four masks for images of this shape, on their device."""
        if self._masks is None or self._masks.shape[1:] != image.shape[2:] or self._masks.device != image.device:
            self._masks = hybrid_masks(self.plan.delta, image.shape[2], image.shape[3], self.plan.mask).to(image.device)
        return self._masks

    def examples(self, rows: Tensor, number: int = 0) -> dict[str, Tensor]:
        """What goes into the hybrids of some forget images, and what comes out.

        Args:
            rows: (R,) int64 positions in the forget set.
            number: The pass.

        Returns:
            ``forget`` (R, C, H, W), ``remain`` and ``mixture`` (R, n, C, H, W), ``old_label`` (R,), ``new_label``
            (R, n), ``index`` (R,) and ``masks`` (4, H, W).
        """
        count = self.plan.count
        hybrid = (rows[:, None] * count + torch.arange(count)).flatten()
        forget = self.forget.__getitems__(rows)
        remain = self.remain.__getitems__(self.partners(number)[hybrid])
        masks = self.masks(remain["image"])
        sources = forget["image"].repeat_interleave(count, 0)
        mixture = blend(remain["image"], sources, masks[hybrid % count % MASKS])
        return {
            "forget": forget["image"],
            "remain": remain["image"].unflatten(0, (len(rows), count)),
            "mixture": mixture.unflatten(0, (len(rows), count)),
            "old_label": forget["label"],
            "new_label": remain["label"].view(len(rows), count),
            "index": forget["index"],
            "masks": masks,
        }


def shuffled(cards: Tensor, generator: torch.Generator) -> Tensor:
    """The entries of a 1-D tensor in random order, drawn from a generator on the CPU."""
    return cards[torch.randperm(len(cards), generator=generator)]
