"""LightningModules: one file for each method, one folder for each family."""

from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.lightning_modules.classification.classifier import Classifier
from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.lightning_modules.unlearning.fine_tune import FineTune
from torchlethe.lightning_modules.unlearning.retrain import Retrain
from torchlethe.lightning_modules.unlearning.sfron import SFRon

__all__ = ["ClassificationModule", "Classifier", "FineTune", "Retrain", "SFRon", "UnlearningModule"]
