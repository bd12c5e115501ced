"""Protections: each turns clean images into images that a network cannot be trained on; plain PyTorch."""

from torchlethe.updates.protection.adversarial_poisoning import AdversarialPoisoningProtector
from torchlethe.updates.protection.autoregressive import AutoregressiveProtector
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.deep_confuse import DeepConfuseProtector
from torchlethe.updates.protection.error_minimizing import ErrorMinimizingProtector
from torchlethe.updates.protection.hypocritical import HypocriticalProtector
from torchlethe.updates.protection.one_pixel_shortcut import OnePixelShortcutProtector
from torchlethe.updates.protection.random_noise import RandomNoiseProtector
from torchlethe.updates.protection.robust_error_minimizing import RobustErrorMinimizingProtector
from torchlethe.updates.protection.self_ensemble import SelfEnsembleProtector
from torchlethe.updates.protection.synthetic_shortcut import SyntheticShortcutProtector
from torchlethe.updates.protection.tensor_clog import TensorClogProtector

__all__ = [
    "AdversarialPoisoningProtector",
    "AutoregressiveProtector",
    "Batches",
    "DeepConfuseProtector",
    "ErrorMinimizingProtector",
    "HypocriticalProtector",
    "OnePixelShortcutProtector",
    "Protection",
    "RandomNoiseProtector",
    "Reduce",
    "RobustErrorMinimizingProtector",
    "SelfEnsembleProtector",
    "SyntheticShortcutProtector",
    "TensorClogProtector",
]
