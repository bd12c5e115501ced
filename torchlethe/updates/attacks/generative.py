"""Attacks that learn a generator of perturbations: GAP one perturbation, NAG a distribution of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam

from torchlethe.arguments import check_at_least
from torchlethe.components.distributed import all_reduce_sum, world_size
from torchlethe.components.noise_generator import LatentGenerator, ResidualGenerator, seeded
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.data import mix_seed
from torchlethe.functional.universal import (
    feature_gathering_loss,
    kept_probability,
    least_likely_entropy,
    perturbed,
    project,
)
from torchlethe.updates.attacks.base import LossAttack, OptimizerFactory


def gap_optimizer(parameters: Iterable[Any]) -> Adam:
    """Adam with GAP's settings: rate 2e-4, β₁ 0.5."""
    return Adam(parameters, lr=2e-4, betas=(0.5, 0.999))


def nag_optimizer(parameters: Iterable[Any]) -> Adam:
    """Adam with rate 1e-3."""
    return Adam(parameters, lr=1e-3)


def of_joined_mean(mean: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a mean over the batches of all ranks, whose gradient is right once DDP has averaged it.

    Args:
        mean: a scalar, the mean over this rank's batch; every rank has equally many images.
        function: differentiable.

    Returns:
        The function's value at the joined mean.
    """
    with torch.enable_grad():
        joined = (all_reduce_sum(mean) / world_size()).clone().requires_grad_()
        value = function(joined)
        (slope,) = torch.autograd.grad(value, joined)
    return value.detach() + slope * (mean - mean.detach())


class GenerativePerturbation(LossAttack):
    """GAP: v is a residual generator's answer to a fixed random image, scaled into the ball channel by channel.

    Poursaeed, Katsman, Gao, Belongie, "Generative Adversarial Perturbations", CVPR 2018. The loss is log CE with the
    least likely class of the clean prediction, or with the target.

    Args:
        target: class that all images shall get, None for an untargeted attack.
        width: channels of the generator's first layer.
        blocks: its residual blocks.
        seed: of the fixed image and of the generator's start.
        optimizer: makes the optimizer over the generator.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        target: int | None = None,
        width: int = 16,
        blocks: int = 3,
        seed: int = 0,
        optimizer: OptimizerFactory = gap_optimizer,
    ) -> None:
        super().__init__(optimizer)
        self.target, self.width, self.blocks, self.seed = target, width, blocks, seed
        self.z = torch.empty(0)

    def prepare(self, noise: UniversalNoise) -> None:
        """Build the generator, and draw what it is asked with."""
        shape = tuple(noise.v.shape[1:])
        self.generator = seeded(ResidualGenerator, self.seed, shape, self.width, self.blocks).to(noise.v.dtype)
        self.z = torch.rand(1, *shape, generator=torch.Generator().manual_seed(self.seed)).to(noise.v.dtype)
        self.generator.to(noise.v.device)
        self.after_step(noise, -1)

    def perturbation(self, noise: UniversalNoise) -> Tensor:
        """V (1, C, H, W) with its gradient to the generator: each channel times min(1, ξ / its largest entry)."""
        assert self.generator is not None
        self.z = self.z.to(noise.v.device)
        v = self.generator(self.z).to(noise.v.dtype)
        largest = v.abs().amax((2, 3), keepdim=True)
        # the clamp takes away what rounding leaves above ξ
        return project(v * (noise.xi / largest.clamp(min=1e-12)).clamp(max=1.0), noise.xi, noise.p)

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log CE of the perturbed images."""
        logits = network(noise(batch["image"], self.perturbation(noise))).logits
        return of_joined_mean(least_likely_entropy(logits, batch["clean_logits"], self.target), torch.log), {}

    @torch.no_grad()
    def after_step(self, noise: UniversalNoise, k: int) -> None:
        """Keep the generator's answer as v."""
        noise.v.copy_(self.perturbation(noise))
        noise.project_()


class PerturbationDistribution(LossAttack):
    """NAG: a generator of many perturbations, each of which fools, and which differ from one another.

    Mopuri, Ojha, Garg, Babu, "NAG: Network for Adversary Generation", CVPR 2018. The fooling loss is −log(1 − q̄); the
    diversity loss is the mean cosine between the features of x + δ_z and x + δ_z′. v is the generator's answer to the
    first vector, so that the method is judged like the others.

    Args:
        diversity: weight of the diversity loss.
        latent: length of the generator's input.
        width: channels of the generator's widest layer.
        seed: of the vectors and of the generator's start.
        optimizer: makes the optimizer over the generator.

    Note:
        Under DDP the vectors of a step are those that one process would draw for the joined batch; the order in which
        they are paired for the diversity is a shift by one within each rank.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        diversity: float = 1.0,
        latent: int = 10,
        width: int = 64,
        seed: int = 0,
        optimizer: OptimizerFactory = nag_optimizer,
    ) -> None:
        check_at_least(0, diversity=diversity)
        super().__init__(optimizer)
        self.diversity, self.latent, self.width, self.seed = diversity, latent, width, seed

    def prepare(self, noise: UniversalNoise) -> None:
        """Build the generator."""
        shape = tuple(noise.v.shape[1:])
        self.generator = seeded(LatentGenerator, self.seed, shape, self.latent, self.width).to(noise.v)
        self.after_step(noise, -1)

    def vectors(self, count: int, k: int, noise: UniversalNoise) -> Tensor:
        """(count, latent) uniform in ±1: this rank's part of what step k draws."""
        ranks = world_size()
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        generator = torch.Generator().manual_seed(mix_seed(self.seed, k + 1))
        drawn = torch.rand(count * ranks, self.latent, generator=generator)[rank::ranks] * 2 - 1
        return drawn.to(noise.v)

    def perturbations(self, z: Tensor, noise: UniversalNoise) -> Tensor:
        """(B, C, H, W) perturbations for vectors (B, latent), each in the ball."""
        assert self.generator is not None
        made = self.generator(z).to(noise.v.dtype) * noise.xi
        return torch.stack([project(one, noise.xi, noise.p) for one in made]) if noise.p < float("inf") else made

    def loss(
        self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fooling and diversity."""
        image = batch["image"]
        made = self.perturbations(self.vectors(len(image), k, noise), noise)
        out = network(perturbed(image, made, noise.clamp))
        kept = kept_probability(out.logits, batch["clean_logits"].argmax(1))
        fooling = of_joined_mean(kept, lambda q: -(1 - q).clamp(min=1e-12).log())
        if not self.diversity:
            return fooling, {}
        other = network(perturbed(image, made.roll(1, 0), noise.clamp))
        told = out.features is not None and other.features is not None
        pair = (out.features, other.features) if told else (out.logits, other.logits)
        alike = feature_gathering_loss(*pair)  # type: ignore[arg-type]
        return fooling + self.diversity * alike, {"fooling": fooling.detach(), "alike": alike.detach()}

    @torch.no_grad()
    def after_step(self, noise: UniversalNoise, k: int) -> None:
        """Keep one of the perturbations as v."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 0))
        first = (torch.rand(1, self.latent, generator=generator) * 2 - 1).to(noise.v)
        noise.v.copy_(self.perturbations(first, noise))
        noise.project_()
