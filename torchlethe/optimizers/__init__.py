"""The sharpness-aware family as optimizers around any base optimizer, for plain PyTorch and Fabric."""

from torchlethe.optimizers.base import SharpnessAwareOptimizer
from torchlethe.optimizers.sam import ASAM, ESAM, GSAM, SAM, SAMON, WSAM, FriendlySAM, LookSAM, VaSSO
from torchlethe.optimizers.two_pass import sam_step

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
    "sam_step",
]
