"""Torchmetrics of unlearning and sharpness: thin shells over torchlethe.functional, correct under DDP and padding."""

from torchlethe.metrics.accuracy import RoleAccuracy
from torchlethe.metrics.agreement import ConfidenceCorrelation, CorrectnessAgreement, OverForgetting
from torchlethe.metrics.definitions import METRIC_DEFINITIONS, MetricDefinition, define_metric
from torchlethe.metrics.divergence import (
    ActivationDistance,
    Completeness,
    DivergenceToReference,
    Wasserstein1,
    ZeroRetrainForgetting,
)
from torchlethe.metrics.membership import (
    BadTeacherMembership,
    MembershipLogistic,
    MembershipSVC,
    MembershipThreshold,
    SimpleMembership,
)
from torchlethe.metrics.relearning import Relearning, RelearningSettings, relearn
from torchlethe.metrics.sensitivity import InputSensitivity
from torchlethe.metrics.sharpness import HessianTopEigenvalue, HessianTrace, MSharpness, SharpnessMetric
from torchlethe.metrics.summary import AverageGap, RuntimeMeter, TugOfWar
from torchlethe.metrics.support_vectors import simple_membership, svc_membership
from torchlethe.metrics.universal import (
    DominanceRatio,
    FeatureGathering,
    FoolingRatio,
    NeuralCollapse,
    TargetSuccess,
)

__all__ = [
    "METRIC_DEFINITIONS",
    "ActivationDistance",
    "AverageGap",
    "BadTeacherMembership",
    "Completeness",
    "ConfidenceCorrelation",
    "CorrectnessAgreement",
    "DivergenceToReference",
    "DominanceRatio",
    "FeatureGathering",
    "FoolingRatio",
    "HessianTopEigenvalue",
    "HessianTrace",
    "InputSensitivity",
    "MSharpness",
    "MembershipLogistic",
    "MembershipSVC",
    "MembershipThreshold",
    "MetricDefinition",
    "NeuralCollapse",
    "OverForgetting",
    "Relearning",
    "RelearningSettings",
    "RoleAccuracy",
    "RuntimeMeter",
    "SharpnessMetric",
    "SimpleMembership",
    "TargetSuccess",
    "TugOfWar",
    "Wasserstein1",
    "ZeroRetrainForgetting",
    "define_metric",
    "relearn",
    "simple_membership",
    "svc_membership",
]
