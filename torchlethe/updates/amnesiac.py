"""Amnesiac unlearning: take back the updates that forget samples took part in.

Source: Graves, Nagisetty, Ganesh, AAAI 2021, https://arxiv.org/abs/2010.10981. (What other repositories call
"amnesiac" is fine-tuning with random labels.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_above
from torchlethe.components.distributed import all_reduce_sum
from torchlethe.components.originals import tensors_hash
from torchlethe.components.sample_gradients import trainable
from torchlethe.components.update_archive import UpdateArchive
from torchlethe.updates.weight_editor import WeightEditor


class AmnesiacUpdate(WeightEditor):
    """Subtract the logged weight changes of every training step whose batch held a forget sample.

    Reads the forget set, and of that only which samples it holds. Fine-tuning on the remaining data afterwards repairs
    what the subtraction damaged.

    Args:
        log: folder that a :class:`~torchlethe.callbacks.UpdateLog` wrote while the network was trained.
        scale: share of the changes that is taken back; 1 is the method.

    Raises:
        ValueError: the log is not there, was not finished, is of another network, or does not cover the forget set.
    """

    def __init__(self, log: str | Path, scale: float = 1.0) -> None:
        super().__init__("forget")
        check_above(0, scale=scale)
        self.archive = UpdateArchive(log)
        self.scale = scale
        self.chosen: list[Path] = []

    def measure(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Find the logged steps that the forget set took part in."""
        summary = self.archive.summary()
        names = {name: p.detach() for name, p in trainable(network).items()}
        if summary["final"] != tensors_hash(names):
            raise ValueError(f"log '{self.archive.folder}' was written for other weights than those of the network.")
        known = torch.tensor(summary["candidates"])
        wanted = torch.zeros(int(known.max()) + 1, dtype=torch.long)
        strangers = torch.zeros((), dtype=torch.long)
        for batch in loaders["forget"]:
            if not isinstance(batch, dict) or "index" not in batch:
                raise ValueError("AmnesiacUpdate needs batches with an 'index' (B,), to know which samples they hold.")
            index = batch["index"].cpu()
            index = index[index >= 0]
            strangers += (~torch.isin(index, known)).sum()
            wanted[index[index < len(wanted)]] = 1
        device = next(iter(names.values())).device
        if missing := int(all_reduce_sum(strangers.to(device))):
            raise ValueError(
                f"log '{self.archive.folder}' covers {len(known)} samples, {missing} of the forget set are others."
            )
        forget = all_reduce_sum(wanted.to(device)).cpu().nonzero().flatten()
        self.chosen = self.archive.steps_with(forget)
        if not self.chosen:
            warnings.warn("no logged step holds a forget sample: nothing to take back.", stacklevel=2)
        return {"amnesiac_steps": float(len(self.chosen)), "amnesiac_logged": float(len(self.archive.steps()))}

    @torch.no_grad()
    def edit(self, network: nn.Module) -> dict[str, Tensor | float]:
        """Subtract the changes of the chosen steps, summed in at least float32."""
        weights = trainable(network)
        sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in weights.items()}
        for path in self.chosen:
            changes = self.archive.read(path)
            torch._foreach_add_(list(sums.values()), [changes[n].to(total) for n, total in sums.items()])
        for name, parameter in weights.items():
            parameter.copy_(parameter.to(sums[name].dtype) - self.scale * sums[name])
        self.chosen = []
        return {"edit_norm": self.scale * torch.stack([s.norm() for s in sums.values()]).norm()}
