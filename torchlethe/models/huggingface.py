"""Image classifiers of Hugging Face transformers, returning logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchlethe.models.checks import check_count, unknown_name
from torchlethe.models.heads import HeadAccess, features_of


class TransformersClassifier(HeadAccess, nn.Module):
    """Adapter for the image classifiers of transformers: ``forward(image)`` returns logits, not an output object.

    Give either ``pretrained`` (weights from a folder or the hub) or ``model_type`` (random weights). Images are float,
    normalised as the weights expect (see the folder's ``preprocessor_config.json``): wrap the adapter in
    :func:`~torchlethe.models.normalized`, with ``half`` for Google's ViTs. Weights are read by transformers, with
    ``weights_only=True`` where they are no safetensors; code from the hub is never run. On several ranks every rank
    reads them.

    Args:
        num_classes: Number of classes, at least 2; a pretrained head with another number is replaced by a random one.
        pretrained: A local folder written by ``save_pretrained``, or the name of a model on the Hugging Face hub.
        model_type: Architecture for random weights, for example ``vit``, ``swin``, ``resnet``, ``convnext``.
        config: Entries of the model's configuration that replace the default or saved ones.

    Attributes:
        model: The model of transformers.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: Both or none of ``pretrained`` and ``model_type``, or an unknown ``model_type``.
        RuntimeError: The folder or hub model could not be read.
    """

    def __init__(
        self,
        num_classes: int,
        pretrained: str | None = None,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (model_type is None):
            raise ValueError(
                "exactly one of pretrained and model_type must be given, "
                f"got pretrained={pretrained!r} and model_type={model_type!r}."
            )
        try:
            from transformers import AutoConfig, AutoModelForImageClassification
            from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TransformersClassifier needs transformers, install it with: pip install 'torchlethe[transformers]'"
            ) from error
        self.num_classes = check_count("num_classes", num_classes, 2)
        entries = {**(config or {}), "num_labels": num_classes}
        if model_type is not None:
            if model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
                raise unknown_name("model_type", model_type, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
            self.model = AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **entries))
            return
        try:
            self.model = AutoModelForImageClassification.from_pretrained(
                pretrained, ignore_mismatched_sizes=True, trust_remote_code=False, weights_only=True, **entries
            )
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise RuntimeError(
                f"pretrained {pretrained!r} could not be read as an image classifier of transformers "
                f"({type(error).__name__}: {reason})."
            ) from error
        # from_pretrained returns models in eval mode, all other networks start in train mode.
        self.model.train()

    def features(self, image: Tensor) -> Tensor:
        """Compute what the classifier reads.

        Args:
            image: ``(B, C, H, W)`` floating point.

        Returns:
            ``(B, D)`` features.
        """
        return features_of(self.model, image)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: ``(B, C, H, W)`` floating point.

        Returns:
            Logits ``(B, num_classes)``.
        """
        if not image.is_floating_point():
            raise TypeError(f"image must be a floating-point tensor with values in [0, 1], got {image.dtype}.")
        return self.model(pixel_values=image).logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as transformers does (``config.json``, ``model.safetensors``).

        Args:
            folder: Created where missing.
        """
        self.model.save_pretrained(folder)
