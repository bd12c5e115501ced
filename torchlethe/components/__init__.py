"""Stateful units that methods share; plain PyTorch, usable in any training loop."""

from torchlethe.components.adaptive_forget_loss import AdaptiveForgetLoss
from torchlethe.components.ascent_rules import RULES, AscentRule, FullGradientRule, ascent_rule
from torchlethe.components.checkpoint_folder import Checkpoint, CheckpointFolder
from torchlethe.components.distributed import all_reduce_mean, all_reduce_sum, gather_in_order, world_size
from torchlethe.components.double_backward import DoubleBackward
from torchlethe.components.fast_slow_updater import FastSlowUpdater
from torchlethe.components.fisher import DiagonalFisher
from torchlethe.components.forget_samples import ForgetSamples
from torchlethe.components.forget_watch import ForgetWatch
from torchlethe.components.modes import (
    batch_norm_in_eval,
    eval_mode,
    frozen_statistics,
    gradients_on,
    normalisation_parameters,
)
from torchlethe.components.network_ensemble import NetworkEnsemble
from torchlethe.components.random_relabel import RandomRelabel
from torchlethe.components.restored import restored
from torchlethe.components.saliency_mask import SaliencyMask
from torchlethe.components.sharpness_engine import NonFiniteGradientError, SharpnessEngine
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise

__all__ = [
    "RULES",
    "AdaptiveForgetLoss",
    "AscentRule",
    "Checkpoint",
    "CheckpointFolder",
    "DiagonalFisher",
    "DoubleBackward",
    "FastSlowUpdater",
    "ForgetSamples",
    "ForgetWatch",
    "FullGradientRule",
    "NetworkEnsemble",
    "NonFiniteGradientError",
    "RandomRelabel",
    "SaliencyMask",
    "SharpnessEngine",
    "SplitNetwork",
    "UniversalNoise",
    "all_reduce_mean",
    "all_reduce_sum",
    "ascent_rule",
    "batch_norm_in_eval",
    "eval_mode",
    "frozen_statistics",
    "gather_in_order",
    "gradients_on",
    "normalisation_parameters",
    "restored",
    "world_size",
]
