"""LightningModules: one file for each method, one folder for each family."""

from torchlethe.lightning_modules.attacks.base import UniversalPerturbation
from torchlethe.lightning_modules.attacks.cosine import CosineUAP
from torchlethe.lightning_modules.attacks.deepfool import DeepFoolUAP
from torchlethe.lightning_modules.attacks.df import DFUAP
from torchlethe.lightning_modules.attacks.feature_gathering import FeatureGatheringUAP
from torchlethe.lightning_modules.attacks.gap import GAPUAP
from torchlethe.lightning_modules.attacks.gd import GDUAP
from torchlethe.lightning_modules.attacks.nag import NAGUAP
from torchlethe.lightning_modules.attacks.random_perturbation import RandomPerturbation
from torchlethe.lightning_modules.attacks.sgd import SGDUAP
from torchlethe.lightning_modules.attacks.trm import TRMUAP
from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.lightning_modules.classification.classifier import Classifier
from torchlethe.lightning_modules.protection.adversarial_poisoning import AdversarialPoisoning
from torchlethe.lightning_modules.protection.autoregressive import Autoregressive
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.lightning_modules.protection.deep_confuse import DeepConfuse
from torchlethe.lightning_modules.protection.diversity import CheckpointDiversity
from torchlethe.lightning_modules.protection.error_minimizing import ErrorMinimizing
from torchlethe.lightning_modules.protection.hypocritical import Hypocritical
from torchlethe.lightning_modules.protection.one_pixel_shortcut import OnePixelShortcut
from torchlethe.lightning_modules.protection.random_noise import RandomNoise
from torchlethe.lightning_modules.protection.robust_error_minimizing import RobustErrorMinimizing
from torchlethe.lightning_modules.protection.self_ensemble import SelfEnsembleProtection
from torchlethe.lightning_modules.protection.synthetic_shortcut import SyntheticShortcut
from torchlethe.lightning_modules.protection.tensor_clog import TensorClog
from torchlethe.lightning_modules.unlearning.amnesiac import Amnesiac
from torchlethe.lightning_modules.unlearning.bad_teacher import BadTeacher
from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.lightning_modules.unlearning.boundary import BoundaryExpand, BoundaryShrink
from torchlethe.lightning_modules.unlearning.convolutions import CFW, CT, MSG
from torchlethe.lightning_modules.unlearning.fine_tune import FineTune
from torchlethe.lightning_modules.unlearning.fisher_forgetting import FisherForgetting
from torchlethe.lightning_modules.unlearning.gradient_ascent import NPO, GradientAscent, NegGradPlus
from torchlethe.lightning_modules.unlearning.influence import InfluenceUnlearning
from torchlethe.lightning_modules.unlearning.jit import JiT
from torchlethe.lightning_modules.unlearning.l1_sparse import L1Sparse
from torchlethe.lightning_modules.unlearning.last_blocks import CFk, EUk
from torchlethe.lightning_modules.unlearning.mu_mis import MUMis
from torchlethe.lightning_modules.unlearning.natmu import NatMU
from torchlethe.lightning_modules.unlearning.random_label import RandomLabel
from torchlethe.lightning_modules.unlearning.retrain import Retrain
from torchlethe.lightning_modules.unlearning.salun import SalUn, SalUnSoft
from torchlethe.lightning_modules.unlearning.scar import SCAR
from torchlethe.lightning_modules.unlearning.scrub import SCRUB
from torchlethe.lightning_modules.unlearning.sfron import SFRon
from torchlethe.lightning_modules.unlearning.ssd import ASSD, LFSSD, SSD
from torchlethe.lightning_modules.unlearning.unsir import UNSIR

__all__ = [
    "ASSD",
    "CFW",
    "CT",
    "DFUAP",
    "GAPUAP",
    "GDUAP",
    "LFSSD",
    "MSG",
    "NAGUAP",
    "NPO",
    "SCAR",
    "SCRUB",
    "SGDUAP",
    "SSD",
    "TRMUAP",
    "UNSIR",
    "AdversarialPoisoning",
    "Amnesiac",
    "Autoregressive",
    "BadTeacher",
    "BoundaryExpand",
    "BoundaryShrink",
    "CFk",
    "CheckpointDiversity",
    "ClassificationModule",
    "Classifier",
    "CosineUAP",
    "DeepConfuse",
    "DeepFoolUAP",
    "EUk",
    "ErrorMinimizing",
    "FeatureGatheringUAP",
    "FineTune",
    "FisherForgetting",
    "GradientAscent",
    "Hypocritical",
    "InfluenceUnlearning",
    "JiT",
    "L1Sparse",
    "MUMis",
    "NatMU",
    "NegGradPlus",
    "OnePixelShortcut",
    "ProtectionModule",
    "RandomLabel",
    "RandomNoise",
    "RandomPerturbation",
    "Retrain",
    "RobustErrorMinimizing",
    "SFRon",
    "SalUn",
    "SalUnSoft",
    "SelfEnsembleProtection",
    "SyntheticShortcut",
    "TensorClog",
    "UniversalPerturbation",
    "UnlearningModule",
]
