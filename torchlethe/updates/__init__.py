"""Each method's update rule as a plain PyTorch object: the procedure of the paper without a trainer."""

from torchlethe.updates.amnesiac import AmnesiacUpdate
from torchlethe.updates.bad_teacher import BadTeacherUpdate
from torchlethe.updates.base import LossUpdate, UpdateRule
from torchlethe.updates.boundary import BoundaryExpandUpdate, BoundaryShrinkUpdate
from torchlethe.updates.convolutions import CFWUpdate, CTUpdate, MSGUpdate
from torchlethe.updates.fine_tune import FineTuneUpdate
from torchlethe.updates.fisher_forgetting import FisherForgettingUpdate
from torchlethe.updates.gradient_ascent import GradientAscentUpdate, NegGradPlusUpdate, NPOUpdate
from torchlethe.updates.influence import InfluenceUpdate
from torchlethe.updates.jit import JiTUpdate
from torchlethe.updates.l1_sparse import L1SparseUpdate
from torchlethe.updates.last_blocks import CFkUpdate, EUkUpdate
from torchlethe.updates.mu_mis import MUMisUpdate
from torchlethe.updates.natmu import NatMUUpdate
from torchlethe.updates.random_label import RandomLabelUpdate
from torchlethe.updates.salun import SalUnSoftUpdate, SalUnUpdate
from torchlethe.updates.scar import SCARUpdate
from torchlethe.updates.scrub import SCRUBUpdate
from torchlethe.updates.sfron import SFRonUpdate
from torchlethe.updates.ssd import SSDUpdate
from torchlethe.updates.unsir import UNSIRUpdate
from torchlethe.updates.weight_editor import WeightEditor

__all__ = [
    "AmnesiacUpdate",
    "BadTeacherUpdate",
    "BoundaryExpandUpdate",
    "BoundaryShrinkUpdate",
    "CFWUpdate",
    "CFkUpdate",
    "CTUpdate",
    "EUkUpdate",
    "FineTuneUpdate",
    "FisherForgettingUpdate",
    "GradientAscentUpdate",
    "InfluenceUpdate",
    "JiTUpdate",
    "L1SparseUpdate",
    "LossUpdate",
    "MSGUpdate",
    "MUMisUpdate",
    "NPOUpdate",
    "NatMUUpdate",
    "NegGradPlusUpdate",
    "RandomLabelUpdate",
    "SCARUpdate",
    "SCRUBUpdate",
    "SFRonUpdate",
    "SSDUpdate",
    "SalUnSoftUpdate",
    "SalUnUpdate",
    "UNSIRUpdate",
    "UpdateRule",
    "WeightEditor",
]
