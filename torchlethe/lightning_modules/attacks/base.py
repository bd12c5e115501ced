"""The base of all universal attacks: learn v with the network frozen, judge it, hand it on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_choice
from torchlethe.components.batch_norm_folding import foldable_pairs, folded_network, folded_weights
from torchlethe.components.clean_cache import BatchCache, IndexCache
from torchlethe.components.perturbation_file import load_perturbation
from torchlethe.components.split_network import SplitNetwork, find_feature_layer
from torchlethe.components.universal_noise import Init, UniversalNoise, check_ball
from torchlethe.data import labelled, model_input
from torchlethe.io import load_weights
from torchlethe.lightning_modules.attacks.image_source import image_shape
from torchlethe.lightning_modules.attacks.storing import StoredPerturbation, without_network
from torchlethe.lightning_modules.attacks.training_cache import training_cache
from torchlethe.lightning_modules.loops import StepCounter
from torchlethe.metrics.attack import AttackMetrics
from torchlethe.updates.attacks import UniversalAttack, check_range, clean_outputs


class UniversalPerturbation(StoredPerturbation):
    """One perturbation v, ‖v‖_p ≤ ξ, that changes a frozen classifier's prediction on most images.

    ``fit`` learns v, ``test`` judges it on any datamodule, ``predict`` gives perturbed images, and ``forward`` the
    logits of perturbed images, so that every evaluation of a classifier serves for it too. Images are in [0, 1] and
    normalisation belongs to the network. A method's module is this class with typed arguments.

    Fit logs ``train_loss``; validation and test log, as shares in [0, 1], ``…_fooling_ratio``, ``…_accuracy`` under
    attack, ``…_clean_accuracy``, ``…_dominance_k`` and with a target ``…_target_success`` (and ``…_others``, without
    the images that belong to it). Test adds ``test_uap_class``, whether it is among the dominant classes, the cosines
    of features, and neural collapse where asked for.

    Args:
        attack: the method.
        network: the classifier; frozen and in eval mode throughout.
        num_classes: number of classes.
        xi: ξ, in pixel units of images in [0, 1].
        p: the norm; ``inf`` bounds every pixel.
        init: where v starts: ``uniform`` in ±ξ/2, ``sign`` for ±ξ, or ``zero``.
        clamp: whether x + v is clamped to [0, 1], in training and evaluation. FG-UAP's code does not: False reproduces
            it, and its fooling ratios are higher than those of real images.
        target: class that all images shall get, None for an untargeted attack.
        feature_layer: dotted name of the layer whose input is the feature; by default the last Linear that a pass
            reaches.
        image_shape: [C, H, W]; taken from the data by default.
        perturbation: file with a v to start from or to judge, see
            :func:`~torchlethe.components.perturbation_file.load_perturbation`.
        weights: file with the network's weights; checkpoints of this module do not hold them.
        select_on: ``val`` keeps the v with the strictly highest score on the validation data (fooling ratio, or target
            success where there is a target); ``none`` keeps the last one.
        cache_clean: whether clean features and logits of training images are computed once: ``auto`` does where the
            datamodule does not augment and the run has several epochs, ``always`` for any loader whose batches have an
            ``index``, ``never``. Images that change nonetheless are noticed.
        fold_batch_norm: run the attack on a copy whose convolutions have swallowed their BatchNorm: the same function
            up to rounding, and faster.
        neural_collapse: whether ``test`` measures neural collapse.
        mean_image: colour of the image m that the class of v itself is read on; by default ImageNet's mean for three
            channels and ½ for others.
        seed: of the start of v.

    Raises:
        ValueError: an argument is out of range, the network has no such feature layer, data and perturbation differ in
            size, images are not in [0, 1], or the Trainer's precision or clipping does not fit.

    Note:
        Under DDP gradients are averaged over ranks and v is equal on all of them: two ranks with half the batch each
        compute what one process computes on the joined batch, where all ranks have equally many images (``drop_last``).
        v, cosines and cross-entropies are float32 (or float64) under mixed precision; ``bf16-true`` is refused.
    """

    compilable = False
    exported = "perturbation"

    def __init__(
        self,
        attack: UniversalAttack,
        network: nn.Module,
        num_classes: int,
        xi: float = 10 / 255,
        p: float = math.inf,
        init: Init = "uniform",
        clamp: bool = True,
        target: int | None = None,
        feature_layer: str | None = None,
        image_shape: Sequence[int] | None = None,
        perturbation: str | Path | None = None,
        weights: str | Path | None = None,
        select_on: Literal["val", "none"] = "val",
        cache_clean: Literal["auto", "always", "never"] = "auto",
        fold_batch_norm: bool = True,
        neural_collapse: bool = False,
        mean_image: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        check_ball(xi, p)
        if target is not None and not 0 <= target < num_classes:
            raise ValueError(f"target is {target}, with num_classes={num_classes} it must lie in 0…{num_classes - 1}.")
        check_choice(("val", "none"), select_on=select_on)
        check_choice(("auto", "always", "never"), cache_clean=cache_clean)
        check_choice(("uniform", "sign", "zero"), init=init)
        if image_shape is not None and (len(image_shape) != 3 or min(image_shape) < 1):
            raise ValueError(f"image_shape is {list(image_shape)}, it must be [channels, height, width].")
        super().__init__(network, num_classes)
        self.save_plain_hyperparameters()
        self.weights_path = Path(weights) if weights is not None else None
        if weights is not None:
            load_weights(network, weights)
        self.attack, self.target = attack, target
        self.xi, self.p, self.init, self.clamp, self.seed = xi, p, init, clamp, seed
        self.feature_layer, self.image_shape, self.mean_image = feature_layer, image_shape, mean_image
        self.start = None if perturbation is None else load_perturbation(perturbation)
        self.select_on, self.cache_clean, self.fold_batch_norm = select_on, cache_clean, fold_batch_norm
        self.neural_collapse = neural_collapse
        self.perturbation: UniversalNoise | None = None
        self.generator: nn.Module | None = None
        self.automatic_optimization = attack.learns_by_loss
        self.val_attack = AttackMetrics(num_classes, target)
        self.test_attack = AttackMetrics(num_classes, target, features=True, collapse=neural_collapse)
        self._split: SplitNetwork | None = None
        self._training_cache: IndexCache | None = None
        self._validation_caches: dict[int, BatchCache] = {}
        self._restored: dict[str, Any] | None = None
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._hash: str | None = None
        self.register_state_dict_post_hook(without_network)

    def build(self, shape: Sequence[int]) -> None:
        """Make v for images of a shape (C, H, W), unless it is there; a run does this by itself."""
        if self.perturbation is not None:
            if tuple(self.perturbation.v.shape[1:]) != tuple(shape):
                sizes = ["×".join(map(str, size)) for size in (shape, self.perturbation.v.shape[1:])]
                raise ValueError(f"images are {sizes[0]}, but the perturbation was made for {sizes[1]}.")
            return
        self.perturbation = UniversalNoise(shape, self.xi, self.p, self.clamp, self.init, self.seed)
        if self.start is not None:
            self.perturbation.assign_(self.start)
        self.attack.prepare(self.perturbation)
        self.generator = self.attack.generator
        self.perturbation.v.requires_grad_(self.generator is None)  # DDP asks for a gradient of all that require one

    def setup(self, stage: str) -> None:
        """Check data, target and Trainer, and make v for the size of the images."""
        super().setup(stage)
        trainer, name = self.trainer, type(self).__name__
        if str(trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision is {trainer.precision}, which is too coarse for v: {name} needs bf16-mixed, 16-mixed, "
                "32-true or 64-true."
            )
        if stage == "fit" and trainer.gradient_clip_val:
            raise ValueError(f"gradient_clip_val is {trainer.gradient_clip_val}, but v is bounded by xi: leave it out.")
        if stage == "fit" and not self.attack.learns_by_loss and trainer.world_size > 1:
            raise ValueError(f"{name} changes v image after image, so it runs on one device, not {trainer.world_size}.")
        if self.perturbation is None:
            self.build(self.image_shape or image_shape(self))
        # a network in eval mode is no mistake here
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        if not self._frozen:
            self._frozen = [(p, p.requires_grad) for p in self.network.parameters()]
            self.network.requires_grad_(False).eval()
        self._check_network()

    def _check_network(self) -> None:
        """Ask the network for the logits of one grey image, before anything is done with it."""
        shape = self.noise.v.shape[1:]
        first = next(self.network.parameters(), self.noise.v)
        try:
            with torch.no_grad():
                logits = self.network(torch.full((1, *shape), 0.5, dtype=first.dtype, device=first.device))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the network {type(self.network).__name__} does not take images of shape {tuple(shape)}: {error}"
            ) from error
        if tuple(logits.shape) != (1, self.num_classes):
            raise ValueError(
                f"the network gives logits of shape {tuple(logits.shape)} for one image, "
                f"expected (1, {self.num_classes})."
            )

    def teardown(self, stage: str) -> None:
        """Leave the network as it was."""
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        self._frozen = []
        self._forget_caches()

    def _forget_caches(self) -> None:
        if self._split is not None:
            self._split.close()
        self._split, self._training_cache = None, None
        self._validation_caches = {}

    def train(self, mode: bool = True) -> UniversalPerturbation:
        """Change the mode of everything but the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def on_fit_start(self) -> None:
        """Make sure that the network is in eval mode, whatever mode it came in."""
        self._labels_checked = False
        self.network.eval()
        if self._restored is not None:
            self.attack.load_state_dict(self._restored)
            self._restored = None

    @property
    def split(self) -> SplitNetwork:
        """The network as the attack sees it: frozen, with its features, BatchNorm folded where that is possible."""
        if self._split is None:
            self.network.eval()
            # outside inference mode, as the copy's weights are used in autograd later
            with torch.inference_mode(False), torch.no_grad():
                example = self.noise.v.detach().clone().abs()
                layer = None
                if "features" in self.attack.clean or self.feature_layer or self._wants_features():
                    layer = find_feature_layer(self.network, example, self.feature_layer)
                watched = self.attack.watched(self.network, example)
                network = self.network
                if self.fold_batch_norm and not watched and (pairs := foldable_pairs(network, example)):
                    network = folded_network(self.network, pairs)
                    network.load_state_dict(folded_weights(self.network, pairs), strict=False)
            self._split = SplitNetwork(network.eval(), layer, watched)
        return self._split

    def _wants_features(self) -> bool:
        """Features are of no use to some attacks and missing in some networks; test then goes without them."""
        if self.neural_collapse:
            return True
        return any(isinstance(module, nn.Linear) for module in self.network.modules())

    def configure_optimizers(self) -> Any:
        """The attack's optimizer over v or its generator."""
        return self.attack.configure(self.noise) if self.automatic_optimization else StepCounter()

    def on_train_start(self) -> None:
        """Ask the network about all clean training images at once, where that saves work."""
        self.network.eval()
        if self._training_cache is None:
            self._training_cache = training_cache(self, self.cache_clean)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the labels of the first batch only where they are used."""
        if self.attack.reads_labels:
            super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One step of the attack."""
        batch = dict(model_input(batch if self.attack.reads_labels else labelled(batch)))
        image = batch["image"]
        check_range(image, batch_idx)
        if self._training_cache is not None:
            batch |= self._training_cache.get(batch["index"], image)
        elif self.attack.clean:
            batch |= clean_outputs(self.split, image)
        if not self.automatic_optimization:
            logs = self.attack.step(self.split, self.noise, batch, self.global_step)
            self.optimizers().step()  # type: ignore[union-attr]
            self.log_dict({f"train_{name}": value for name, value in logs.items()}, batch_size=len(image))
            return None
        loss, logs = self.attack.loss(self.split, self.noise, batch, self.global_step)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(image))
        self.log_dict({f"train_{name}": value for name, value in logs.items()}, batch_size=len(image))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then bring v back into its ball: after every step, and only then (accumulation skips some)."""
        k = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.attack.after_step(self.noise, k)

    def on_train_epoch_end(self) -> None:
        """Log how much of v lies at its bounds, and make sure that cached images were the same ones."""
        if math.isinf(self.p):
            self.log("train_saturation", self.noise.saturation())
        if self._training_cache is not None:
            self._training_cache.check()
