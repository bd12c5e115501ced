"""How a universal perturbation is judged: validation, test, perturbed images."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchlethe.components.clean_cache import BatchCache
from torchlethe.components.split_network import Outputs, SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.data import labelled, model_input
from torchlethe.lightning_modules.base import ClassificationModule
from torchlethe.metrics.attack import AttackMetrics, uap_classes
from torchlethe.updates.attacks import UniversalAttack, check_range, clean_outputs


class JudgedPerturbation(ClassificationModule):
    """The part of :class:`UniversalPerturbation` that measures and applies v; not for use by itself."""

    attack: UniversalAttack
    perturbation: UniversalNoise | None
    target: int | None
    select_on: Literal["val", "none"]
    neural_collapse: bool
    mean_image: Sequence[float] | None
    val_attack: AttackMetrics
    test_attack: AttackMetrics
    _validation_caches: dict[int, BatchCache]
    _uap: Outputs

    @property
    @abstractmethod
    def split(self) -> SplitNetwork:
        """The network as the attack sees it."""

    @abstractmethod
    def build(self, shape: Sequence[int]) -> None:
        """Make v for images of a shape (C, H, W)."""

    def clean_outputs(self, image: Tensor) -> dict[str, Tensor]:
        """Features and logits of clean images, in the precision of the run."""
        with self.trainer.precision_plugin.forward_context():
            return clean_outputs(self.split, image)

    @property
    def noise(self) -> UniversalNoise:
        """The perturbation with its ball.

        Raises:
            RuntimeError: its size is not known yet.
        """
        if self.perturbation is None:
            raise RuntimeError("the size of the perturbation is not known before a run: give image_shape.")
        return self.perturbation

    def current(self) -> Tensor:
        """V (1, C, H, W): the running one in a fit, otherwise the one that did best (the last without selection)."""
        # a finished trainer still says that it was fitting
        state = None if self._trainer is None else self._trainer.state
        fitting = state is not None and state.fn == "fit" and state.status == "running"
        return self.noise.v.detach() if fitting else self.noise.chosen

    def perturb(self, image: Tensor) -> Tensor:
        """Perturb images (B, C, H, W) in [0, 1]; in at least float32."""
        return self.noise(image, self.current())

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K) of the perturbed images."""
        if self.perturbation is None:
            self.build(image.shape[1:])
            self.noise.to(image.device)
        return super().forward(self.perturb(image))

    def on_train_end(self) -> None:
        """Say so when nothing was found."""
        if float(self.noise.best_score) == 0:
            what = "changed no prediction" if self.target is None else f"sent no image to class {self.target}"
            warnings.warn(f"{type(self).__name__} found nothing: v {what} on the validation data.", stacklevel=2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare predictions with those on clean images, which are asked for once."""
        batch = model_input(batch)
        image, v = batch["image"], self.current()
        check_range(image, batch_idx)

        def compute() -> dict[str, Tensor]:
            return {"prediction": self.clean_outputs(image)["clean_logits"].argmax(1)}

        cache = self._validation_caches.setdefault(dataloader_idx, BatchCache())
        clean = cache.get(batch_idx, image, compute)["prediction"]
        self.val_attack.update(self.split(self.noise(image, v)).logits.float(), clean, batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log, and keep v if no other did as well."""
        found = self.val_attack.compute()
        self.log_dict({f"val_{name}": value for name, value in found.items()}, prog_bar=True)
        self.val_attack.reset()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and self.select_on == "val":
            self.noise.keep_if_better_(float(found["fooling_ratio" if self.target is None else "target_success"]))

    def on_test_start(self) -> None:
        """Find the feature of v itself."""
        self._uap = self.split(self.noise.v.new_tensor(self._mean()).view(1, -1, 1, 1) + self.noise.chosen)
        features = self._uap.features is not None
        self.test_attack = AttackMetrics(
            self.num_classes, self.target, features=features, collapse=features and self.neural_collapse
        ).to(self.device)
        self.test_attack.use_head(self.split.head_weight())

    def _mean(self) -> list[float]:
        channels = self.noise.v.shape[1]
        mean = self.mean_image or ((0.485, 0.456, 0.406) if channels == 3 else [0.5] * channels)
        if len(mean) != channels:
            raise ValueError(f"mean_image has {len(mean)} numbers, but the images have {channels} channels.")
        return list(mean)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare logits and features with those of clean images."""
        batch = model_input(batch)
        check_range(batch["image"], batch_idx)
        clean = clean_outputs(self.split, batch["image"])
        out = self.split(self.perturb(batch["image"]))
        self.test_attack.update(
            out.logits.float(),
            clean["clean_logits"].argmax(1),
            batch["label"],
            out.features,
            clean.get("clean_features"),
            self._uap.features,
        )

    def on_test_epoch_end(self) -> None:
        """Log everything."""
        found = self.test_attack.compute()
        histogram = self.trainer.strategy.reduce(self.test_attack.histogram(), reduce_op="sum")
        found |= uap_classes(self._uap.logits, histogram)
        self.log_dict({f"test_{name}": value for name, value in found.items()})
        self.test_attack.reset()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Perturbed images, uint8 where the bound still holds after rounding, and the logits that they get.

        Returns:
            ``index`` (B,), ``image`` (B, C, H, W) uint8, ``logits`` (B, K) of these very images, and ``label`` (B,)
            where the batch has labels.
        """
        complete = labelled(batch)
        had_labels, batch = complete is batch, model_input(complete)
        image = batch["image"]
        check_range(image, batch_idx)
        written = self.rounded(image)
        logits = self.split(written.to(self.noise.v.dtype) / 255).logits.float()
        self._predicted = len(logits) + (self._predicted if batch_idx else 0)
        counted = torch.arange(self._predicted - len(logits), self._predicted, device=logits.device)
        found = {"index": batch.get("index", counted), "image": written, "logits": logits}
        return found | {"label": batch["label"]} if had_labels else found

    def rounded(self, image: Tensor) -> Tensor:
        """Perturbed images as uint8: whole pixel steps, rounded towards the clean image so that ξ holds for p = ∞."""
        moved = self.perturb(image).clamp(0, 1) * 255
        clean = (image.float() * 255).round()
        # 1e-3 of a pixel step: a bound of 8/255 must not become 7 by rounding
        change = moved - clean
        return (clean + change.sign() * (change.abs() + 1e-3).floor()).clamp(0, 255).to(torch.uint8)
