"""What each number of an evaluation means: for reports, tooltips and tables."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Orientation = Literal["reference", "higher", "lower"]


class MetricDefinition(NamedTuple):
    """One metric.

    Attributes:
        title: a short name for table heads.
        definition: one sentence.
        unit: ``%``, ``nats``, ``s``, ``×`` or empty.
        orientation: what is good: as close as possible to Retrain's value (``reference``), ``higher`` or ``lower``.
    """

    title: str
    definition: str
    unit: str
    orientation: Orientation


_FEATURES = {
    "correctness": "whether the predicted class is right",
    "confidence": "the true label's probability",
    "loss": "the cross-entropy",
    "entropy": "the entropy of the prediction",
    "m_entropy": "the modified entropy (definition of Song and Mittal)",
    "m_entropy_as_published": "the modified entropy as the SalUn family of repositories computes it",
    "probabilities": "all class probabilities",
}

_ATTACKS = {
    "logistic": (
        "logistic",
        "Percentage of the forget set that a logistic regression on {feature}, fitted on all remaining (member) and "
        "all test (non-member) samples, predicts to be members (SFRon's attack when the feature is the entropy).",
    ),
    "svc": (
        "SVC",
        "Percentage of the forget set that a support-vector classifier on {feature}, fitted on test samples "
        "(non-members) and as many remaining samples (members), predicts to be non-members (SalUn's MIA-efficacy).",
    ),
    "svc_all": (
        "SVC, all members",
        "Percentage of the forget set that a support-vector classifier on {feature}, fitted on all remaining (member) "
        "and all test (non-member) samples, predicts to be members (the bad-teacher attack when the feature is the "
        "entropy).",
    ),
    "threshold": (
        "threshold",
        "Percentage of the forget set on the member side of the class-wise threshold on {feature} that best separates "
        "remaining (member) from test (non-member) samples.",
    ),
}


_SETS = {"forget": "the forget set", "remain": "the remaining training set", "test": "the test set"}


def _drop(which: str, name: str) -> tuple[str, MetricDefinition]:
    what = _SETS[name] if name == "remain" else "the test set without what was to be forgotten"
    sentence = (
        f"Mean over the classes that are to be kept of max(0, Retrain's accuracy − the model's) on {what}."
        if which == "class_drop"
        else f"The largest loss of accuracy against Retrain of a class that is to be kept, on {what}."
    )
    title = f"{'over-forgetting per class' if which == 'class_drop' else 'worst class drop'}, {name}"
    return f"{which}_{name}", MetricDefinition(title, sentence, "%", "lower")


def _accuracy(title: str, samples: str, orientation: Orientation) -> MetricDefinition:
    return MetricDefinition(title, f"Percentage of {samples} that are classified correctly.", "%", orientation)


METRIC_DEFINITIONS: dict[str, MetricDefinition] = {
    "forget_accuracy": _accuracy("forget accuracy", "the forget set's samples", "reference"),
    "unlearning_accuracy": MetricDefinition("unlearning accuracy", "100 minus the forget accuracy.", "%", "reference"),
    "remain_accuracy": _accuracy("remain accuracy", "the remaining training samples", "reference"),
    "test_accuracy": _accuracy("test accuracy", "the test samples", "reference"),
    "validation_accuracy": _accuracy("validation accuracy", "the validation samples", "reference"),
    "test_forget_accuracy": _accuracy("test accuracy, forgotten", "the test samples of forgotten classes", "reference"),
    "test_remain_accuracy": _accuracy("test accuracy, remaining", "the test samples of other classes", "reference"),
    **{
        f"mia_{feature}_{attack}": MetricDefinition(
            f"MIA {feature.replace('_', ' ')}, {title}", sentence.format(feature=what), "%", "reference"
        )
        for attack, (title, sentence) in _ATTACKS.items()
        for feature, what in _FEATURES.items()
        if feature != "probabilities" or attack.startswith("svc")
    },
    "mia_simple": MetricDefinition(
        "simple MIA",
        "Accuracy in percent of telling forget from test samples by their loss (kit of the NeurIPS 2023 challenge); "
        "50 is guessing.",
        "%",
        "reference",
    ),
    "mia_simple_indiscernibility": MetricDefinition(
        "indiscernibility", "100 where the simple attack guesses, 0 where it is always right.", "%", "higher"
    ),
    **{
        f"agreement_{name}": MetricDefinition(
            f"agreement, {name}",
            f"Percentage of {what} for which the model predicts the same class as Retrain.",
            "%",
            "higher",
        )
        for name, what in _SETS.items()
    },
    **{
        f"correctness_agreement_{name}": MetricDefinition(
            f"same correctness, {name}",
            f"Percentage of {what} on which model and Retrain are both right or both wrong.",
            "%",
            "higher",
        )
        for name, what in _SETS.items()
    },
    "confidence_correlation": MetricDefinition(
        "confidence correlation",
        "Pearson's correlation over the forget set of the model's and Retrain's probabilities of the true label.",
        "",
        "higher",
    ),
    "over_forgetting": MetricDefinition(
        "over-forgetting", "max(0, Retrain's forget accuracy − the model's): NatMU's OF.", "%", "lower"
    ),
    **dict(_drop(which, name) for which in ("class_drop", "worst_class_drop") for name in ("test", "remain")),
    "relearning_steps": MetricDefinition(
        "relearning time",
        "Steps of SGD on forget samples until the forget accuracy is back within a margin (5 points unless said) of "
        "the original model's; a model that is not back after the most steps allowed (200 unless said) has that many.",
        "steps",
        "reference",
    ),
    "relearning_ratio": MetricDefinition(
        "anamnesis index",
        "The relearning time divided by Retrain's: far below 1 the model still holds what it was to forget.",
        "×",
        "reference",
    ),
    "kl_to_reference": MetricDefinition(
        "KL", "Mean over the forget set of KL(Retrain's prediction ‖ the model's prediction).", "nats", "lower"
    ),
    "js_to_reference": MetricDefinition(
        "JS", "Mean over the forget set of the Jensen–Shannon divergence between both predictions.", "nats", "lower"
    ),
    "activation_distance": MetricDefinition(
        "activation distance", "Mean over the forget set of the distance between both probability vectors.", "", "lower"
    ),
    "completeness": MetricDefinition(
        "completeness", "Percentage of the forget set for which both models predict the same class.", "%", "higher"
    ),
    "wasserstein1_confidence": MetricDefinition(
        "W1 confidence", "Wasserstein-1 distance between both models' confidences on the forget set.", "", "lower"
    ),
    "wasserstein1_loss": MetricDefinition(
        "W1 loss", "Wasserstein-1 distance between both models' losses on the forget set.", "nats", "lower"
    ),
    "parameter_distance": MetricDefinition(
        "weight distance", "Euclidean distance of all parameters to Retrain's.", "", "lower"
    ),
    "parameter_distance_relative": MetricDefinition(
        "weight distance, relative",
        "Euclidean distance of all parameters to Retrain's, divided by their own norm.",
        "",
        "lower",
    ),
    "zrf": MetricDefinition(
        "ZRF", "One minus the bad-teacher divergence to an untrained network on the forget set.", "", "reference"
    ),
    "average_gap": MetricDefinition(
        "avg. gap",
        "Mean absolute difference to Retrain over forget, remain and test accuracy and the first membership metric, of "
        "each seed.",
        "%",
        "lower",
    ),
    "validation_gap": MetricDefinition(
        "val. gap",
        "The average gap with held-out training samples in place of the test set, to choose settings by.",
        "%",
        "lower",
    ),
    "tug_of_war": MetricDefinition(
        "ToW", "Product of 1 − |difference to Retrain| / 100 over forget, remain and test accuracy.", "", "higher"
    ),
    "tug_of_war_mia": MetricDefinition(
        "ToW-MIA",
        "Product of 1 − |difference to Retrain| / 100 over the SVC-confidence attack, remain and test accuracy.",
        "",
        "higher",
    ),
    "test_loss": MetricDefinition("test loss", "Mean loss of the test samples.", "nats", "lower"),
    "train_loss": MetricDefinition(
        "train loss", "Mean loss of the training samples, without augmentation, in eval mode.", "nats", "lower"
    ),
    "hessian_top_eigenvalue": MetricDefinition(
        "λ max", "Largest (algebraic) eigenvalue of the Hessian of the mean training loss, in eval mode.", "", "lower"
    ),
    "hessian_trace": MetricDefinition(
        "tr H", "Trace of the Hessian of the mean training loss, in eval mode, estimated by random signs.", "", "lower"
    ),
    "m_sharpness": MetricDefinition(
        "m-sharpness",
        "Mean rise of the training loss over groups of m samples after a climb of radius ρ along the group's gradient.",
        "nats",
        "lower",
    ),
    "acc_last": MetricDefinition(
        "test accuracy",
        "Percentage of clean test samples classified correctly after the last epoch of training on (protected) data; "
        "the lower, the stronger the protection.",
        "%",
        "lower",
    ),
    "acc_max": MetricDefinition(
        "best epoch",
        "The same for the best epoch, which somebody with clean validation data might stop at.",
        "%",
        "lower",
    ),
    "acc_worst_class": MetricDefinition(
        "worst class",
        "Percentage of clean test samples classified correctly in the class where it is lowest.",
        "%",
        "lower",
    ),
    "drop": MetricDefinition(
        "drop", "Points of test accuracy that protection costs against the same training on clean data.", "%", "higher"
    ),
    "gain_over_clean_part": MetricDefinition(
        "gain over clean part",
        "Points of test accuracy that the protected images add to training on the clean ones alone.",
        "%",
        "lower",
    ),
    "test_fooling_ratio": MetricDefinition(
        "fooling ratio",
        "Share of test images whose prediction the perturbation changes; labels play no part.",
        "",
        "higher",
    ),
    "test_target_success": MetricDefinition(
        "target success", "Share of test images that are predicted as the target under the perturbation.", "", "higher"
    ),
    "test_dominance_1": MetricDefinition(
        "dominance", "Share of the most frequent prediction on perturbed test images.", "", "higher"
    ),
    "run_seconds": MetricDefinition(
        "time", "Seconds of preparation and loop of the run itself, without validation and evaluation.", "s", "lower"
    ),
    "speed_up": MetricDefinition("speed-up", "Retrain's seconds divided by this run's.", "×", "higher"),
}


def define_metric(name: str) -> MetricDefinition | None:
    """The definition of a metric, also of one of the original or the reference model.

    Args:
        name: a key of an evaluation, e.g. ``forget_accuracy`` or ``original_forget_accuracy``. Other accuracies
            (``<set>_accuracy``) are defined by their set's name.

    Returns:
        The definition, or ``None`` for an unknown name.

    Example:
        >>> define_metric("original_test_accuracy").title
        'original: test accuracy'
    """
    if name in METRIC_DEFINITIONS:
        return METRIC_DEFINITIONS[name]
    if prefixed := re.fullmatch(r"(original|reference)_(.+)", name):
        found = define_metric(prefixed[2])
        return found and found._replace(title=f"{prefixed[1]}: {found.title}")
    if (held_out := name.removeprefix("validation_")) != name and (found := METRIC_DEFINITIONS.get(held_out)):
        words = f"{found.definition} With validation samples in place of the test set."
        return found._replace(title=f"{found.title}, val.", definition=words)
    if named := re.fullmatch(r"(\w+)_accuracy", name):
        return _accuracy(f"{named[1].replace('_', ' ')} accuracy", f"the samples of the set {named[1]!r}", "reference")
    return None
