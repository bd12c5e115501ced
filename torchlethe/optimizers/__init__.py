"""The sharpness-aware family as optimizers around any base optimizer, for plain PyTorch and Fabric."""

from torchlethe.optimizers.base import SharpnessAwareOptimizer
from torchlethe.optimizers.manual import sam_step
from torchlethe.optimizers.sam import ASAM, ESAM, GSAM, SAM, SAMON, WSAM, FriendlySAM, LookSAM, VaSSO
from torchlethe.optimizers.schedules import WarmMultiStep

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
    "sam_step",
]
