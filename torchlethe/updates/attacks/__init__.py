"""Universal attacks as plain PyTorch: one objective each, crafted by :func:`craft` or by a LightningModule."""

from torchlethe.updates.attacks.base import LossAttack, UniversalAttack, check_range, clean_outputs, craft
from torchlethe.updates.attacks.cosine_logits import CosineLogits
from torchlethe.updates.attacks.deepfool import DeepFoolAttack
from torchlethe.updates.attacks.feature_gathering import FeatureGathering
from torchlethe.updates.attacks.generative import GenerativePerturbation, PerturbationDistribution
from torchlethe.updates.attacks.layer_saturation import LayerSaturation
from torchlethe.updates.attacks.margin import MarginAttack
from torchlethe.updates.attacks.random_noise import RandomNoise
from torchlethe.updates.attacks.sign_gradient import SignGradient
from torchlethe.updates.attacks.truncated_ratio import TruncatedRatio

__all__ = [
    "CosineLogits",
    "DeepFoolAttack",
    "FeatureGathering",
    "GenerativePerturbation",
    "LayerSaturation",
    "LossAttack",
    "MarginAttack",
    "PerturbationDistribution",
    "RandomNoise",
    "SignGradient",
    "TruncatedRatio",
    "UniversalAttack",
    "check_range",
    "clean_outputs",
    "craft",
]
