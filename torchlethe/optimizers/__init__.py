"""The sharpness-aware family as optimizers around any base optimizer, for plain PyTorch and Fabric; schedules."""

from torchlethe.optimizers.base import SharpnessAwareOptimizer
from torchlethe.optimizers.manual import sam_step
from torchlethe.optimizers.sam import ASAM, ESAM, GSAM, SAM, SAMON, WSAM, FriendlySAM, LookSAM, VaSSO
from torchlethe.optimizers.schedules import WarmMultiStep, WarmupDropLR, warmup_drop_factor

__all__ = [
    "ASAM",
    "ESAM",
    "GSAM",
    "SAM",
    "SAMON",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "SharpnessAwareOptimizer",
    "VaSSO",
    "WarmMultiStep",
    "WarmupDropLR",
    "sam_step",
    "warmup_drop_factor",
]
