"""Lightning callbacks; each works in anyone's Trainer."""

from torchlethe.callbacks.acceleration import ChannelsLast, CompileNetwork
from torchlethe.callbacks.export_weights import ExportWeights
from torchlethe.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from torchlethe.callbacks.save_predictions import SavePredictions
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation

__all__ = [
    "ChannelsLast",
    "CompileNetwork",
    "ExportWeights",
    "NonFiniteError",
    "NonFiniteGuard",
    "SavePredictions",
    "UnlearningEvaluation",
]
