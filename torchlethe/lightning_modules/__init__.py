"""LightningModules: one file for each method, one folder for each family."""

from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.lightning_modules.classification.classifier import Classifier
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
    "LFSSD",
    "MSG",
    "NPO",
    "SCAR",
    "SCRUB",
    "SSD",
    "UNSIR",
    "Amnesiac",
    "BadTeacher",
    "BoundaryExpand",
    "BoundaryShrink",
    "CFk",
    "ClassificationModule",
    "Classifier",
    "EUk",
    "FineTune",
    "FisherForgetting",
    "GradientAscent",
    "InfluenceUnlearning",
    "JiT",
    "L1Sparse",
    "MUMis",
    "NatMU",
    "NegGradPlus",
    "RandomLabel",
    "Retrain",
    "SFRon",
    "SalUn",
    "SalUnSoft",
    "UnlearningModule",
]
