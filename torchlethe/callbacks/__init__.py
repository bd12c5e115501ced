"""Lightning callbacks; each works in anyone's Trainer."""

from torchlethe.callbacks.acceleration import ChannelsLast, CompileNetwork
from torchlethe.callbacks.ascent_direction import AscentDirection
from torchlethe.callbacks.checkpoint_ensemble import CheckpointEnsemble
from torchlethe.callbacks.export_perturbation import ExportPerturbation
from torchlethe.callbacks.export_weights import ExportWeights
from torchlethe.callbacks.hybrid_grid import HybridGrid
from torchlethe.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from torchlethe.callbacks.nothing_to_forget import NothingToForget
from torchlethe.callbacks.protected_writer import ProtectedWriter
from torchlethe.callbacks.protection_evaluation import ProtectionEvaluation
from torchlethe.callbacks.save_predictions import SavePredictions
from torchlethe.callbacks.sharpness_aware import SharpnessAware
from torchlethe.callbacks.sharpness_evaluation import SharpnessEvaluation
from torchlethe.callbacks.training_defences import AdversarialTraining, UEraser
from torchlethe.callbacks.transfer_matrix import TransferMatrix
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation
from torchlethe.callbacks.update_log import UpdateLog

__all__ = [
    "AdversarialTraining",
    "AscentDirection",
    "ChannelsLast",
    "CheckpointEnsemble",
    "CompileNetwork",
    "ExportPerturbation",
    "ExportWeights",
    "HybridGrid",
    "NonFiniteError",
    "NonFiniteGuard",
    "NothingToForget",
    "ProtectedWriter",
    "ProtectionEvaluation",
    "SavePredictions",
    "SharpnessAware",
    "SharpnessEvaluation",
    "TransferMatrix",
    "UEraser",
    "UnlearningEvaluation",
    "UpdateLog",
]
