"""Stateful units that methods share; plain PyTorch, usable in any training loop."""

from torchlethe.components.adaptive_forget_loss import AdaptiveForgetLoss
from torchlethe.components.distributed import all_reduce_sum, world_size
from torchlethe.components.fast_slow_updater import FastSlowUpdater
from torchlethe.components.fisher import DiagonalFisher
from torchlethe.components.modes import batch_norm_in_eval, eval_mode
from torchlethe.components.saliency_mask import SaliencyMask

__all__ = [
    "AdaptiveForgetLoss",
    "DiagonalFisher",
    "FastSlowUpdater",
    "SaliencyMask",
    "all_reduce_sum",
    "batch_norm_in_eval",
    "eval_mode",
    "world_size",
]
