"""What a universal attack is: an objective on batches, an optimizer over v, a projection after each step."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.data import labelled, model_input

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Labels = Literal["predicted", "given"]


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Adam as in FG-UAP's code: rate 0.02, weight decay 1e-5 in its coupled form."""
    return Adam(parameters, lr=0.02, weight_decay=1e-5)


class UniversalAttack:
    """One method's way of learning a perturbation; :func:`craft` is its plain loop, a LightningModule its other home.

    Args:
        optimizer: makes the optimizer from the parameters that are learned.

    Attributes:
        clean: what the method asks of the clean images: ``features``, ``logits``, both or nothing. The caller computes
            it without gradient, once where images do not change, and hands it over in the batch.
        generator: a network that makes v, for methods that learn one; its parameters are learned in place of v.
        reads_labels: whether the true labels are used.
    """

    clean: ClassVar[frozenset[str]] = frozenset()
    learns_by_loss: ClassVar[bool] = True
    generator: nn.Module | None = None
    reads_labels: bool = False

    def __init__(self, optimizer: OptimizerFactory = default_optimizer) -> None:
        self.optimizer = optimizer

    def watched(self, network: nn.Module, example: Tensor) -> list[str]:
        """Names of the layers whose outputs the method reads, none by default.

        Args:
            network: the classifier in eval mode.
            example: (1, C, H, W), an image to try.
        """
        return []

    def prepare(self, noise: UniversalNoise) -> None:
        """Build what depends on the size of the images; called once before ``configure``."""

    def configure(self, noise: UniversalNoise) -> Optimizer:
        """Make the optimizer over v, or over the generator."""
        parameters = [noise.v] if self.generator is None else list(self.generator.parameters())
        noise.v.requires_grad_(self.generator is None)
        return self.optimizer(parameters)

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise on a batch, and detached scalars worth logging.

        Args:
            network: frozen, in eval mode.
            noise: holds v.
            batch: ``image`` (B, C, H, W) in [0, 1], ``label`` (B,), and what ``clean`` asks for as ``clean_features``
                (B, d) and ``clean_logits`` (B, K).
            k: number of steps done before.
        """
        raise NotImplementedError

    def step(self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int) -> dict[str, Any]:
        """Change v by one batch, for methods without a loss; returns numbers worth logging."""
        raise NotImplementedError

    def after_step(self, noise: UniversalNoise, k: int) -> None:
        """What follows an optimizer step: the projection into the ball."""
        noise.project_()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside v, generator and optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class LossAttack(UniversalAttack, ABC):
    """A method whose step is one gradient of a loss."""

    @abstractmethod
    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise; see :class:`UniversalAttack`."""


def warn_at_zero(noise: UniversalNoise) -> None:
    """Say that a cosine with the clean output has no gradient where v starts."""
    if not bool(noise.v.detach().any()):
        warnings.warn(
            "v starts at zero, where the cosine has no gradient: the first steps follow rounding noise; "
            "use init 'uniform' unless this is what you study.",
            stacklevel=3,
        )


def attacked_classes(batch: Mapping[str, Any], labels: Labels) -> Tensor:
    """(B,) the classes that an attack starts from: clean predictions, or the true labels."""
    return batch["label"] if labels == "given" else batch["clean_logits"].argmax(1)


def clean_outputs(network: SplitNetwork, image: Tensor) -> dict[str, Tensor]:
    """Features and logits of clean images, without gradient, in at least float32.

    Returns:
        ``clean_logits`` (B, K), and ``clean_features`` (B, d) where the network tells them.
    """
    with torch.no_grad():
        out = network(image)
    found = {"clean_logits": out.logits}
    if out.features is not None:
        found["clean_features"] = out.features
    return {name: value.float() if value.itemsize < 4 else value for name, value in found.items()}


def check_range(image: Tensor, batch_idx: int) -> None:
    """Refuse normalised images, in the first batch of a pass: ξ and the clamp are meant for [0, 1].

    Args:
        image: (B, C, H, W) floating.
        batch_idx: its place in the pass; later batches are not looked at, as that waits for the device.

    Raises:
        ValueError: they lie far outside [0, 1]; what interpolation overshoots is let through.
    """
    if batch_idx:
        return
    low, high = (float(value) for value in image.aminmax())
    if low < -0.25 or high > 1.25:
        raise ValueError(
            f"images range from {low:.3g} to {high:.3g}, they must lie in [0, 1]: normalisation belongs to the network "
            "(torchlethe.models.normalized)."
        )


def craft(
    attack: UniversalAttack,
    network: SplitNetwork,
    noise: UniversalNoise,
    batches: Iterable[Any],
    epochs: int = 1,
    after_epoch: Callable[[int], None] | None = None,
) -> Tensor:
    """Learn a perturbation in a plain loop, without a Trainer.

    Args:
        attack: the method.
        network: the classifier, frozen and in eval mode.
        noise: where v starts; changed in place.
        batches: re-iterable batches, dicts or ``(image, label)`` tuples, images in [0, 1]; images alone for
            attacks that read no labels.
        epochs: passes over the batches.
        after_epoch: called with the number of finished epochs.

    Returns:
        v, detached.

    Raises:
        ValueError: images lie far outside [0, 1], or the batches can be gone through only once.

    Example:
        >>> from torchlethe.updates.attacks import FeatureGathering
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> batches = [(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]
        >>> noise = UniversalNoise((1, 8, 8), 0.1)
        >>> v = craft(FeatureGathering(), SplitNetwork(model.requires_grad_(False), "3"), noise, batches)
        >>> v.shape, bool(v.abs().max() <= 0.1)
        (torch.Size([1, 1, 8, 8]), True)
    """
    if epochs > 1 and iter(batches) is batches:
        raise ValueError(f"batches can be gone through once only, but epochs is {epochs}: give a list or a loader.")
    attack.prepare(noise)
    optimizer = attack.configure(noise) if attack.learns_by_loss else None
    k = 0
    for epoch in range(epochs):
        for given in batches:
            batch = model_input(given if attack.reads_labels else labelled(given))
            check_range(batch["image"], k)
            if attack.clean:
                batch = batch | clean_outputs(network, batch["image"])
            if optimizer is None:
                attack.step(network, noise, batch, k)
            else:
                optimizer.zero_grad(set_to_none=True)
                loss, _ = attack.loss(network, noise, batch, k)
                loss.backward()
                optimizer.step()
                attack.after_step(noise, k)
            k += 1
        if after_epoch is not None:
            after_epoch(epoch + 1)
    return noise.v.detach()
