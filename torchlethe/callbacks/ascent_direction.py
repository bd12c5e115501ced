"""The experiment that F-SAM starts from: SAM that climbs along the full gradient, or along the batch's noise only."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.callbacks.second_pass import uncounted
from torchlethe.callbacks.sharpness_aware import SharpnessAware
from torchlethe.callbacks.sharpness_data import find_train_source
from torchlethe.components import FullGradientRule, frozen_statistics
from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many


class AscentDirection(SharpnessAware):
    """SAM with a choice of what it climbs along: the batch's gradient g, the full gradient G, or the noise in g.

    ``batch`` is SAM. ``full`` climbs along G, the gradient over the whole training set. ``noise`` climbs along
    g − (⟨g, G⟩/‖G‖²)·G, what is left of g without its projection on G. F-SAM (arXiv:2403.12350) rests on the
    observation that the noise is what makes SAM generalise; its moving average stands for G, which is costly: a pass
    over the training set at every refresh. A research tool for small data.

    Args:
        direction: ``batch``, ``full`` or ``noise``.
        rho: radius of the climb, positive.
        refresh: optimizer steps between two computations of G, at least 1.
        options: further arguments of :class:`~torchlethe.callbacks.SharpnessAware` that concern every method, such as
            ``perturb`` or ``scope``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        G is that of the mean cross-entropy of the module's ``forward`` over the training samples without augmentation,
        with layers in train mode. Under DDP each rank takes its share, and all have the same G.
    """

    def __init__(
        self,
        direction: Literal["batch", "full", "noise"] = "noise",
        rho: float = 0.05,
        refresh: int = 1,
        **options: Any,
    ) -> None:
        check_choice(("batch", "full", "noise"), direction=direction)
        check_at_least(1, refresh=refresh)
        super().__init__("sam", rho, **options)
        self.direction, self.refresh = direction, refresh
        if direction != "batch":
            self.engine.rule = FullGradientRule(direction)

    @property
    def state_key(self) -> str:
        """Apart from other methods, whose state means something else."""
        return self._generate_state_key(direction=self.direction)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compute G when it is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        memory, step = self.engine.memory.buffers, trainer.global_step
        new_step = batch_idx % trainer.accumulate_grad_batches == 0
        if self.direction != "batch" and new_step and (step % self.refresh == 0 or "full" not in memory):
            memory["full"] = self._full_gradient(trainer, pl_module)

    def _full_gradient(self, trainer: Trainer, pl_module: LightningModule) -> dict[Tensor, Tensor]:
        params = [param for param in self._names if param.requires_grad]
        sums = [torch.zeros_like(param) for param in params]
        count = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        source = find_train_source(trainer, pl_module, None)
        with (
            frozen_statistics(self._layers, self.freeze),
            uncounted(self._metrics),
            trainer.precision_plugin.train_step_context(),
        ):
            for image, label in source.batches(trainer.global_rank, trainer.world_size):
                loss = nn.functional.cross_entropy(pl_module(image), label, reduction="sum")
                grads = torch.autograd.grad(loss, params, allow_unused=True)
                found = [(total, grad) for total, grad in zip(sums, grads, strict=True) if grad is not None]
                torch._foreach_add_([total for total, _ in found], [grad for _, grad in found])
                count += len(label)
        sums = all_reduce_sum_many(sums)
        torch._foreach_div_(sums, all_reduce_sum(count).clamp_min(1).to(sums[0].dtype))
        return dict(zip(params, sums, strict=True))
