"""Lightning callbacks; each works in anyone's Trainer."""

from torchlethe.callbacks.acceleration import ChannelsLast, CompileNetwork
from torchlethe.callbacks.ascent_direction import AscentDirection
from torchlethe.callbacks.export_weights import ExportWeights
from torchlethe.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from torchlethe.callbacks.save_predictions import SavePredictions
from torchlethe.callbacks.sharpness_aware import SharpnessAware
from torchlethe.callbacks.sharpness_evaluation import SharpnessEvaluation
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation

__all__ = [
    "AscentDirection",
    "ChannelsLast",
    "CompileNetwork",
    "ExportWeights",
    "NonFiniteError",
    "NonFiniteGuard",
    "SavePredictions",
    "SharpnessAware",
    "SharpnessEvaluation",
    "UnlearningEvaluation",
]
