"""SEP, SEP-FA and SEP-FA-VR: the checkpoints of one training run protect the data it was trained on.

Source: Chen et al., "Self-Ensemble Protection: Training Checkpoints Are Good Data Protectors", ICLR 2023; official code
Sizhe-Chen/SEP (``ens.py``, ``ens_feature.py``, ``ens_feature_svre.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_choice
from torchlethe.components import gradients_on
from torchlethe.components.checkpoint_folder import CheckpointFolder
from torchlethe.components.network_ensemble import NetworkEnsemble
from torchlethe.components.originals import tensors_hash
from torchlethe.data.hashing import generator_for
from torchlethe.functional.self_ensemble import (
    checked_target_map,
    equidistant,
    gradient_cosines,
    opposite_classes,
    pixel_step,
    svre_direction,
)
from torchlethe.models import FeatureNetwork, NormalizedClassifier, features_and_logits
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.ensemble_gradients import EnsembleGradients

Variant = Literal["sep", "sep_fa", "sep_fa_vr"]
Ensemble = str | Path | Sequence[Mapping[str, Tensor]]


class Step(NamedTuple):
    """One step of the optimisation.

    Attributes:
        image: the images after it, (B, C, H, W) int16 in 0…255.
        matches: how many of the N checkpoints gave an image its wrong class before it, (B,).
        loss: mean loss over the checkpoints before it, (B,).
    """

    image: Tensor
    matches: Tensor
    loss: Tensor


class SelfEnsembleProtector(EnsembleGradients, Protection):
    """The SEP procedure; the arguments are those of :class:`torchlethe.lightning_modules.SelfEnsembleProtection`.

    Notes about each image, after the last step: ``matches`` (how many checkpoints see the wrong class it is pushed to),
    ``unrecognised`` (1 where no checkpoint sees its true class), ``loss`` (mean over checkpoints; ``loss_before`` that
    of the clean image).

    Args:
        network: a classifier of images in [0, 1] that gives the architecture; copied.
        num_classes: number of classes.
        ensemble: folder of a :class:`~torchlethe.callbacks.CheckpointEnsemble`, or state dicts, oldest first.
        variant: ``sep``, ``sep_fa`` or ``sep_fa_vr``.
        radius: ε, in units of 1/255.
        step: α, in units of 1/255.
        steps: T.
        checkpoints: N, chosen at equal distances from those in the ensemble.
        inner_steps: M, for ``sep_fa_vr``.
        target: g(0), g(1), …; by default the class K/2 further.
        labels: ``given``, or ``predicted`` to push each image away from what the last checkpoint sees in it.
        compat: ``fixed``, or ``official`` for the two mistakes of the official code.
        seed: seed of the checkpoints drawn by ``sep_fa_vr``.
        resident: keep all checkpoints on the device.
        vectorised: run all checkpoints as one model.
        fold: fold BatchNorm into convolutions.
        compiled: compile the pass.
        notes: look at the protected images once more for the notes, 1/(2T) of the work.

    Raises:
        FileNotFoundError: the ensemble, or a file of it, does not exist.
        ValueError: an argument is out of range, or a file is not the one that the ensemble lists, or does not fit.
    """

    radius: int

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ensemble: Ensemble,
        variant: Variant = "sep",
        radius: int = 2,
        step: int = 1,
        steps: int = 30,
        checkpoints: int = 30,
        inner_steps: int = 15,
        target: Sequence[int] | None = None,
        labels: Literal["given", "predicted"] = "given",
        compat: Literal["fixed", "official"] = "fixed",
        seed: int = 0,
        resident: bool = False,
        vectorised: bool = False,
        fold: bool = True,
        compiled: bool = False,
        notes: bool = True,
    ) -> None:
        super().__init__()
        for name, value, low, high in (
            ("radius", radius, 1, 255),
            ("step", step, 1, 255),
            ("steps", steps, 1, None),
            ("checkpoints", checkpoints, 1, None),
            ("inner_steps", inner_steps, 1, None),
        ):
            if value != int(value) or value < low or (high is not None and value > high):
                allowed = f"{low}…{high}" if high is not None else f"at least {low}"
                raise ValueError(f"{name} is {value}, it must be a whole number, {allowed}.")
        check_choice(("sep", "sep_fa", "sep_fa_vr"), variant=variant)
        check_choice(("fixed", "official"), compat=compat)
        check_choice(("given", "predicted"), labels=labels)
        if compat == "official" and vectorised:
            raise ValueError("vectorised is true, but compat: official needs the checkpoints one by one.")
        if compiled and vectorised:
            raise ValueError("compiled and vectorised are both true, but the vectorised model is not compiled.")
        inner = network.network if isinstance(network, NormalizedClassifier) else network
        if compiled and not isinstance(inner, FeatureNetwork):
            raise ValueError(
                f"compiled is true, but {type(inner).__name__} is no torchlethe.models.FeatureNetwork: its features "
                "are read by a hook, which would be compiled anew for each checkpoint."
            )
        self.num_classes, self.variant, self.compat, self.seed = num_classes, variant, compat, seed
        self.radius, self.step, self.steps, self.inner_steps = radius, step, steps, inner_steps
        self.vectorised, self.take_notes, self.labels = vectorised, notes, labels
        self.target = opposite_classes(num_classes) if target is None else checked_target_map(target, num_classes)
        # the official train-mode pass makes the means depend on the batches
        self.shards = compat == "fixed"
        self.prepares = variant != "sep"
        fills, self.members = _members(ensemble, checkpoints)
        self.network_ensemble = NetworkEnsemble(
            network, fills, features_and_logits, resident=resident, compiled=compiled
        )
        self.fold, self._folded = fold, False
        self.networks = {"architecture": self.network_ensemble.holder, "folded": self.network_ensemble.skeleton}
        self.architecture = hashlib.sha256(repr(network).encode()).hexdigest()[:16]
        self.means: Tensor | None = None
        self.overwritten: dict[str, Tensor] = {}
        self._first: nn.Module | None = None
        with torch.random.fork_rng(devices=[]):
            self.network_ensemble.weights(0)  # a checkpoint of another network is refused before the work starts
            self.network_ensemble.to(self.network_ensemble.device)

    def to(self, device: torch.device | str) -> Self:
        """Move the networks and the class means to a device."""
        self.network_ensemble.to(device)
        self.target = self.target.to(device)
        if self.means is not None:
            self.means = self.means.to(device, self.network_ensemble.dtype)
        return self

    def describe(self) -> dict[str, Any]:
        """The settings, and which checkpoints are used."""
        settings: dict[str, Any] = {
            "method": type(self).__name__.removesuffix("Protector"),
            "variant": self.variant,
            "radius": self.radius,
            "step": self.step,
            "steps": self.steps,
            "checkpoints": self.checkpoints,
            "target": self.target.tolist(),
            "labels": self.labels,
            "compat": self.compat,
            "ensemble": self.members,
            "architecture": self.architecture,
        }
        return settings | ({"inner_steps": self.inner_steps, "seed": self.seed} if self.variant == "sep_fa_vr" else {})

    def fingerprint(self) -> str:
        """All settings and the checkpoints; not the weights that the network was built with, as they are not used."""
        settings = self.describe() | {"dtype": str(self.network_ensemble.dtype)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def preparation_fingerprint(self) -> str:
        """What the class means depend on: the checkpoints, ``labels`` and ``compat``, not ε or T."""
        settings = {name: self.describe()[name] for name in ("ensemble", "architecture", "labels", "compat")}
        settings["dtype"] = str(self.network_ensemble.dtype)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The class means."""
        return {"prepared": self.prepared, "means": self.means, "overwritten": self.overwritten}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the class means."""
        super().load_state_dict(state)
        self.means = state["means"]
        self.overwritten, self._first = dict(state["overwritten"]), None

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Measure the class means μ_k[c] of the features over all clean images, in eval mode; nothing for ``sep``."""
        with torch.inference_mode(False), torch.no_grad():
            return self._prepare(data, device, reduce)

    def _prepare(self, data: Batches, device: torch.device | str, reduce: Reduce | None) -> dict[str, float]:
        self.to(device)
        self.prepared = True
        if not self.prepares:
            return {}
        sums: Tensor | None = None
        counts = torch.zeros(self.num_classes, dtype=torch.float64, device=device)
        for k in range(self.checkpoints):
            for number, batch in enumerate(data):
                features = self._features(k, number, self._unit(batch["image"])).double()
                label = self._labels(batch["image"], batch["label"])
                if sums is None:
                    sums = features.new_zeros(self.checkpoints, self.num_classes, features.shape[1])
                sums[k].index_add_(0, label, features)
                if k == 0:
                    counts += torch.bincount(label, minlength=self.num_classes)
            if k == 0 and self._first is not None:
                self.overwritten = {name: value.clone() for name, value in self._first.eval().named_buffers()}
        if sums is None:
            raise ValueError("there is no image to measure class means on.")
        if reduce is not None:
            sums, counts = reduce(sums), reduce(counts)
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(f"class {empty[0]} has no image, so that there is no mean feature to push others to.")
        self.means = (sums / counts[:, None]).to(self.network_ensemble.dtype)
        return {"class_mean_images": float(counts.sum())}

    def _features(self, k: int, number: int, image: Tensor) -> Tensor:
        """φ_k; for the official code's first checkpoint in train mode, which also overwrites its statistics."""
        if k or self.compat == "fixed":
            return self.network_ensemble(k, image)[0]
        if number == 0:
            self._first = self._first_network().train()
        assert self._first is not None
        return features_and_logits(self._first, image)[0]

    @torch.no_grad()
    def _labels(self, image: Tensor, label: Tensor) -> Tensor:
        """The classes to push images away from: those given, or what the last checkpoint sees."""
        if self.labels == "given":
            return label
        return self.network_ensemble(self.checkpoints - 1, self._unit(image))[1].argmax(-1)

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Run the T steps."""
        with torch.inference_mode(False):
            label = self._labels(image, label)
        first: Step | None = None
        for step in self.iterate(image, label):
            first = first or step
        assert first is not None
        with gradients_on():
            target = self._targets(label)
            self.notes = {"loss_before": first.loss}
            if self.take_notes:
                loss, matches, recognised = self._look(step.image.clone(), target, label.clone())
                self.notes |= {"loss": loss, "matches": matches, "unrecognised": (recognised == 0).double()}
        return step.image.to(torch.uint8)

    def iterate(self, image: Tensor, label: Tensor) -> Iterator[Step]:
        """The T steps one by one.

        Args:
            image: (B, C, H, W) uint8.
            label: (B,) int64.

        Yields:
            The images after each step.

        Raises:
            RuntimeError: ``prepare`` was not called.
            ValueError: a label is out of range.
        """
        if not self.prepared:
            raise RuntimeError("prepare() comes before protect().")
        for t in range(self.steps):
            with gradients_on():
                if t == 0:
                    clean = image.to(torch.int16)
                    x, target = clean.clone(), self._targets(label)
                direction, matches, loss = self._direction(x, clean, target, t)
                x = pixel_step(x, clean, direction, self.step, self.radius)
            yield Step(x, matches, loss)

    def _targets(self, label: Tensor) -> Tensor:
        low, high = (int(value) for value in label.aminmax())
        if low < 0 or high >= self.num_classes:
            bad = high if high >= self.num_classes else low
            raise ValueError(
                f"a label is {bad}, with num_classes={self.num_classes} it must lie in 0…{self.num_classes - 1}."
            )
        return self.target.to(label.device)[label]

    def _direction(self, x: Tensor, clean: Tensor, target: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the step descends on: the sum of the gradients, or G; with matches (B,) and mean loss (B,)."""
        if self.variant == "sep_fa_vr":
            gradients, losses, matches = self.gradients(x, target, t)
            official = self.compat == "official"
            total = svre_direction(
                x,
                gradients,
                self.draws(t),
                lambda k, inner: self.gradient(k, inner, target, self.checkpoints - 1 if official else None)[0],
                lambda inner, g: pixel_step(inner, clean, g, self.step, self.radius),
                first_is_mean=not official,
            )
            return total, matches.sum(0), losses.mean(0)
        if self.vectorised:
            unit = self._unit(x).requires_grad_(True)
            outputs = self.network_ensemble.all(unit)
            losses = self._losses(None, outputs, target)
            (total,) = torch.autograd.grad(losses.sum(), unit)
            return total, (outputs[1].detach().argmax(-1) == target).sum(0), losses.detach().mean(0)
        total, loss, match = self.gradient(0, x, target, t=t)
        total, matches = total.clone(), match.long()
        for k in range(1, self.checkpoints):
            gradient, losses, match = self.gradient(k, x, target)
            total += gradient
            loss = loss + losses
            matches += match
        return total, matches, loss / self.checkpoints

    def draws(self, t: int) -> list[int]:
        """The checkpoints of step t's inner loop: a function of seed and t alone, so the same for every batch."""
        generator = generator_for("svre", self.seed, t)
        return torch.randint(self.checkpoints, (self.inner_steps,), generator=generator).tolist()

    def cosines(self, image: Tensor, label: Tensor) -> Tensor:
        """|cos| between the checkpoints' input gradients on given images: the paper's measure of their diversity.

        Args:
            image: (B, C, H, W) uint8.
            label: (B,) int64.

        Returns:
            (N, N) float64, summed over the images.
        """
        with gradients_on():
            gradients = self.gradients(image.to(torch.int16), self._targets(label))[0]
            return gradient_cosines(gradients).double().sum(0)


def _members(ensemble: Ensemble, count: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """What fills the networks, and what is said about them in a manifest."""
    if isinstance(ensemble, str | Path):
        folder = CheckpointFolder(ensemble)
        chosen = folder.select(count)
        for checkpoint in chosen:
            folder.verify(checkpoint)
        about = [{"epoch": c.epoch, "step": c.step, "sha256": c.sha256} for c in chosen]
        return [partial(folder.load, checkpoint) for checkpoint in chosen], about
    states = list(ensemble)
    if not 1 <= count <= len(states):
        raise ValueError(f"checkpoints is {count}, the ensemble has {len(states)}.")
    chosen_states = [states[position] for position in equidistant(len(states), count)]
    return chosen_states, [{"sha256": tensors_hash(dict(state))} for state in chosen_states]
