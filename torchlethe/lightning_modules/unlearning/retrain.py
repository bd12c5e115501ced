"""Retrain: the model that never saw the forget set, the reference of exact unlearning."""

from __future__ import annotations

from torchlethe.data import Single
from torchlethe.lightning_modules.classification.classifier import Classifier


class Retrain(Classifier):
    """Train from scratch on the remaining data, by the recipe of the original model.

    The arguments are those of :class:`~torchlethe.lightning_modules.Classifier`; an
    :class:`~torchlethe.datamodules.UnlearningDataModule` hands it the remaining data only.
    """

    feed = Single("remain")
