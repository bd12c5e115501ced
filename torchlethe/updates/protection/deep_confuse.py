"""DeepConfuse: a generator of perturbations, trained against the training of a classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from torchlethe.arguments import check_above, check_at_least
from torchlethe.components import gradients_on
from torchlethe.components.originals import randomised_copy
from torchlethe.data.hashing import mix_seed
from torchlethe.functional.mean_loss import differentiable_twice
from torchlethe.functional.sign_descent import quantized
from torchlethe.models.autoencoder import Autoencoder
from torchlethe.updates.protection.base import Batches, Protection, Reduce
from torchlethe.updates.protection.settings import check_radius, described, own_training_state, progress
from torchlethe.updates.protection.whole_set import WholeSet

State = dict[str, Tensor]


class DeepConfuseProtector(Protection):
    """Learn a generator g so that a classifier trained on x + ε·g(x) is bad on x.

    After Feng et al., "Learning to Confuse", NeurIPS 2019. In a round a classifier is trained anew on x + ε·g(x) by
    plain SGD, θ_{i+1} = θ_i − α·∇_θ CE(h_{θ_i}(x_i + ε·g(x_i)), y_i), while g stays as it is. A copy g' follows this
    trajectory: in each of its steps it takes a virtual step of the classifier, θ' = θ_i − α·∇_θ CE(h_{θ_i}(x_i +
    ε·g'(x_i)), y_i), and goes up the clean loss CE(h_{θ'}(x_i), y_i), differentiated through that step. Then g ← g'.
    Both walk side by side, so no trajectory has to be stored. BatchNorm normalises with each batch. The settings are
    ours: published code exists with trained generators only.

    Args:
        network: the architecture of the classifier, maps images in [0, 1] to logits.
        generator: maps images (B, C, H, W) in [0, 1] to values in [−1, 1] of their shape, image by image; an
            :class:`~torchlethe.models.autoencoder.Autoencoder` by default.
        in_channels: channels of the default generator.
        radius: ε in units of 1/255.
        rounds: how often a classifier is trained.
        steps: SGD steps of a round.
        lr: α of the classifier.
        generator_lr: learning rate of the generator's Adam.
        batch_size: images of a training batch.
        seed: seed of weights and batches.

    Raises:
        ValueError: an argument is out of range; in :meth:`prepare`, the network has no second derivative.
    """

    def __init__(
        self,
        network: nn.Module,
        generator: nn.Module | None = None,
        in_channels: int = 3,
        radius: int = 8,
        rounds: int = 20,
        steps: int = 200,
        lr: float = 0.05,
        generator_lr: float = 1e-3,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, rounds=rounds, steps=steps)
        check_above(0, lr=lr, generator_lr=generator_lr)
        check_at_least(2, batch_size=batch_size)
        self.radius: int = check_radius(radius)
        self.rounds, self.steps, self.lr, self.generator_lr = rounds, steps, float(lr), float(generator_lr)
        self.batch_size, self.seed = batch_size, seed
        architecture = Autoencoder(in_channels) if generator is None else generator
        # what the fingerprint covers must not change with the caller's random state where nobody gave weights
        self.networks = {
            "network": network,
            "generator": randomised_copy(architecture, seed) if generator is None else architecture,
        }
        self.learned: nn.Module | None = None
        self._checked = False

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Train the generator; see :meth:`Protection.prepare`.

        Returns:
            ``clean_loss`` of the classifiers after their virtual steps, mean over the last round.
        """
        with gradients_on(), own_training_state(device, self.seed):
            everything = WholeSet(data, device)
            learner = copy.deepcopy(self.networks["generator"]).to(device).requires_grad_(True).float().train()
            optimizer = torch.optim.Adam(learner.parameters(), lr=self.generator_lr)
            # in double precision other weights would be drawn
            architecture = copy.deepcopy(self.networks["network"]).float()
            parts = {"learner": learner, "optimizer": optimizer}
            state = self.snapshots.resume(device, **parts)
            done, last = (0, 0.0) if state is None else (state["done"], float(state["total"]) / self.steps)
            batches = everything.training_rows(self.batch_size, self.seed, done)
            with progress("DeepConfuse", self.rounds * self.steps, done) as advance:
                for number in range(done // self.steps, self.rounds):
                    fixed = copy.deepcopy(learner).requires_grad_(False)
                    network = randomised_copy(architecture, mix_seed(self.seed, number)).to(device)
                    weights: State = {name: p.requires_grad_() for name, p in network.named_parameters()}
                    total = torch.zeros((), device=device)
                    if state is not None and done % self.steps:  # within a round
                        fixed.load_state_dict(state["fixed"])
                        weights = {name: state["weights"][name].to(device).requires_grad_() for name in weights}
                        total += state["total"].to(device)
                    state = None
                    with differentiable_twice(network):
                        network.train()
                        for _ in range(done % self.steps, self.steps):
                            part = next(batches)
                            image, label = everything.image[part].float() / 255, everything.label[part]
                            total += self._learn(network, weights, learner, optimizer, image, label)
                            moved = self._step(network, weights, self._perturbed(fixed, image), label, False)
                            weights = {name: value.detach().requires_grad_() for name, value in moved.items()}
                            done += 1
                            advance("")
                            self.snapshots.offer(device, **parts, fixed=fixed, total=total, weights=weights, done=done)
                    last = float(total) / self.steps
        self.learned = learner.eval().requires_grad_(False)
        self.prepared = True
        return {"clean_loss": last}

    def _perturbed(self, generator: nn.Module, image: Tensor) -> Tensor:
        return (image + self.radius / 255 * generator(image)).clamp(0, 1)

    def _step(self, network: nn.Module, weights: State, image: Tensor, label: Tensor, virtual: bool) -> State:
        """A plain SGD step of the classifier; one that can be differentiated if it is virtual."""
        loss = F.cross_entropy(_call(network, weights, image), label)
        try:
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=virtual)
        except RuntimeError as error:
            raise ValueError(
                f"the network, a {type(network).__name__}, cannot be differentiated as DeepConfuse needs: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return {name: p - self.lr * g for (name, p), g in zip(weights.items(), gradients, strict=True)}

    def _learn(
        self,
        network: nn.Module,
        weights: State,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        image: Tensor,
        label: Tensor,
    ) -> Tensor:
        """One step of g' up the clean loss after a virtual step; returns that loss."""
        after = self._step(network, weights, self._perturbed(learner, image), label, True)
        loss = F.cross_entropy(_call(network, after, image), label)
        parameters = list(learner.parameters())
        try:
            if not self._checked:
                # a function without a second derivative says so only when all leaves are asked for
                loss.backward(retain_graph=True)
                self._checked = True
            gradients = torch.autograd.grad(-loss, parameters)
        except RuntimeError as error:
            raise ValueError(
                f"the network, a {type(network).__name__}, cannot be differentiated twice, as DeepConfuse needs: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.detach()

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """See :meth:`Protection.protect`."""
        if self.learned is None:
            raise RuntimeError("prepare() has to train the generator before images are protected.")
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            made = self.learned(image.float() / 255)
        return quantized(image, self.radius * made)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        return described(self, "rounds", "steps", "lr", "generator_lr", "batch_size", "seed")

    def to(self, device: torch.device | str) -> Self:
        """See :meth:`Protection.to`."""
        if self.learned is not None:
            self.learned.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Any]:
        """The trained generator's weights."""
        learned = {} if self.learned is None else dict(self.learned.state_dict())
        return super().state_dict() | {"generator": learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Protection.load_state_dict`."""
        super().load_state_dict(state)
        self.learned = None
        if state["generator"]:
            self.learned = copy.deepcopy(self.networks["generator"]).float().eval().requires_grad_(False)
            self.learned.load_state_dict(state["generator"])


def _call(network: nn.Module, weights: State, image: Tensor) -> Tensor:
    """Logits with other weights; the running statistics of BatchNorm move in copies that are dropped."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return functional_call(network, {**buffers, **weights}, (image,))
