"""A frozen network's logits, computed once for each sample, for methods that ask it for the same images again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchlethe.components.distributed import gather_in_order
from torchlethe.components.modes import eval_mode
from torchlethe.data import PADDING_LABEL, model_input


class TeacherLogits:
    """Look-up of a teacher's logits by the samples' ``index``, in place of a forward pass.

    The images of training have to be those that were looked up here, so they must not be augmented; the first batch of
    each look-up is compared with the teacher itself.

    Args:
        teacher: the frozen network.
        batches: all samples in a fixed order without augmentation, with their ``index``; under DDP each rank's share.

    Raises:
        ValueError: the batches have no ``index``, or there are none.

    Note:
        The table, (N, K) in the logits' precision, is on the teacher's device, under DDP whole on every rank.

    Example:
        >>> batch = {"image": torch.rand(3, 1, 2, 2), "label": torch.arange(3) % 2, "index": torch.tensor([7, 2, 5])}
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> torch.allclose(TeacherLogits(teacher, [batch])(batch), teacher(batch["image"]))
        True
    """

    def __init__(self, teacher: nn.Module, batches: Iterable[Any]) -> None:
        self.teacher, self.checked = teacher, False
        indices, rows = [], []
        with eval_mode(teacher), torch.no_grad():
            for raw in batches:
                batch = model_input(raw)
                if "index" not in batch:
                    raise ValueError("cache_teacher is set, but the batches have no `index` to know a sample by.")
                indices.append(torch.where(batch["label"] == PADDING_LABEL, -1, batch["index"]))
                rows.append(teacher(batch["image"]).detach())
        if not rows:
            raise ValueError("cache_teacher is set, but there are no samples to ask the teacher about.")
        index, logits = gather_in_order(torch.cat(indices)), gather_in_order(torch.cat(rows))
        real = index >= 0
        order = index[real].argsort()
        self.index, self.logits = index[real][order], logits[real][order]

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits of a batch.

        Args:
            batch: with ``image`` (B, …) and ``index`` (B,).

        Returns:
            (B, K), as the teacher gives them.

        Raises:
            ValueError: (at the first batch) its images are not those of the table.
        """
        found = self.look_up(batch["index"])
        if not self.checked and len(found):
            self.checked = True
            with eval_mode(self.teacher), torch.no_grad():
                asked = self.teacher(batch["image"])
            tolerance = 1e-3 if asked.dtype in (torch.float32, torch.float64) else 5e-2
            same = bool(torch.isin(batch["index"], self.index).all())
            if not same or not torch.allclose(found.float(), asked.float(), tolerance, tolerance):
                raise ValueError(
                    "cache_teacher is set, but training images differ from those the teacher was asked about: leave it "
                    "out, or train without augmentation (augmentation: null)."
                )
        return found

    def look_up(self, index: Tensor) -> Tensor:
        """The rows of the table for samples (B,), without a check; arbitrary ones for samples that it does not have."""
        return self.logits[torch.searchsorted(self.index, index).clamp_max(len(self.index) - 1)]
