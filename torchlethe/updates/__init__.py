"""Each method's update rule as a plain PyTorch object: the procedure of the paper without a trainer."""

from torchlethe.updates.base import LossUpdate, UpdateRule
from torchlethe.updates.fine_tune import FineTuneUpdate
from torchlethe.updates.sfron import SFRonUpdate

__all__ = ["FineTuneUpdate", "LossUpdate", "SFRonUpdate", "UpdateRule"]
