"""Robust error-minimising noise (REM): made against a network that is trained adversarially."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_above, check_at_least
from torchlethe.components import gradients_on
from torchlethe.data.hashing import mix_seed
from torchlethe.functional.sign_descent import sign_descent
from torchlethe.updates.protection.base import Batches, Reduce
from torchlethe.updates.protection.draws import random_crops, uniform_noise
from torchlethe.updates.protection.frozen import frozen
from torchlethe.updates.protection.joint_noise import JointNoiseProtector, error_rate, input_gradient
from torchlethe.updates.protection.settings import own_training_state, progress
from torchlethe.updates.protection.whole_set import WholeSet

_TRAIN, _FINAL = 0, 1  # purposes of random numbers


class RobustErrorMinimizingProtector(JointNoiseProtector):
    """REM: min over θ and δ of E_t max over ‖ρ‖ ≤ ε_a of CE(h_θ(t(x + δ) + ρ), y), with random crops and flips t.

    Fu et al., "Robust Unlearnable Examples", ICLR 2022, fshp971/robust-unlearnable-examples. Each training step
    makes new noise for its batch (every ``perturb_every`` steps) and takes an SGD step on an adversarial example of the
    noised batch. A step of the noise averages over ``samples`` transforms: for each an inner attack finds ρ, and the
    gradient there is pulled back through t alone. In the end the noise of all images is made anew.

    With ``attack_radius=0, samples=1, crop=0, flip=False`` this is that repository's way of making EM noise.

    Args:
        network: the architecture, maps images in [0, 1] to logits.
        radius: ε in units of 1/255.
        step: α of the noise in units of 1/255.
        steps: steps of the noise each time, from a uniformly random start.
        samples: transforms that a step averages over.
        attack_radius: ε_a in units of 1/255; 0 for no attack.
        attack_step: step of the attack.
        attack_steps: number of steps of the attack, from a uniformly random start.
        crop: largest shift of the random crops in pixels.
        flip: mirror images at random.
        train_steps: SGD steps of the network.
        perturb_every: training steps for each new noise of a batch.
        decay_every: training steps after which the learning rate is divided by 10.
        lr: learning rate of the network's SGD.
        momentum: its momentum.
        weight_decay: its weight decay.
        batch_size: images of a training batch.
        search_batch_size: images whose final noise is made at a time.
        seed: seed of weights, batches, starts, crops and flips.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        radius: int = 8,
        step: float = 1.6,
        steps: int = 10,
        samples: int = 5,
        attack_radius: float = 4.0,
        attack_step: float = 0.8,
        attack_steps: int = 10,
        crop: int = 4,
        flip: bool = True,
        train_steps: int = 5000,
        perturb_every: int = 1,
        decay_every: int = 2000,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 128,
        search_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(network, radius, step, lr, momentum, weight_decay, 0.0, batch_size, search_batch_size, seed)
        counts = {"steps": steps, "samples": samples, "attack_steps": attack_steps, "train_steps": train_steps}
        check_at_least(1, **counts, perturb_every=perturb_every, decay_every=decay_every)
        check_at_least(0, attack_radius=attack_radius, crop=crop)
        check_above(0, attack_step=attack_step)
        self.steps, self.samples, self.crop, self.flip = steps, samples, crop, flip
        self.attack_radius, self.attack_step = float(attack_radius), float(attack_step)
        self.attack_steps, self.train_steps = attack_steps, train_steps
        self.perturb_every, self.decay_every = perturb_every, decay_every

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Learn the noise; see :meth:`Protection.prepare`.

        Returns:
            ``error`` of the network on x + δ at the end.
        """
        with gradients_on(), own_training_state(device, self.seed):
            everything = WholeSet(data, device)
            noise = torch.zeros(everything.image.shape, device=device)
            network = self.fresh_network(device)
            optimizer = self.optimizer(network)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every, 0.1)
            parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "noise": noise}
            done = 0
            if (state := self.snapshots.resume(device, **parts)) is not None:
                done = state["done"]
                del state
            batches = everything.training_rows(self.batch_size, self.seed, done)
            with progress("robust error-minimising noise", self.train_steps, done) as advance:
                for k in range(done, self.train_steps):
                    part = next(batches)
                    image, label, index = (tensor[part] for tensor in everything.tensors)
                    with frozen(network):
                        if k % self.perturb_every == 0:
                            noise[part] = self._noise(network, image.float(), label, index, mix_seed(self.seed, k))
                        seed = mix_seed(self.seed, k, _TRAIN)
                        seen = random_crops((image + noise[part]).clamp_(0, 255), index, seed, self.crop, self.flip)
                        seen = self._attacked(network, seen, label, index, seed)
                    self.train_step(network, optimizer, seen, label)
                    schedule.step()
                    advance("")
                    self.snapshots.offer(device, **parts, done=k + 1)
            seed = mix_seed(self.seed, self.train_steps, _FINAL)
            with frozen(network):
                for part in everything.rows(self.search_batch_size):
                    image, label, index = (tensor[part] for tensor in everything.tensors)
                    noise[part] = self._noise(network, image.float(), label, index, seed)
                rows = torch.arange(len(everything), device=device)
                error = error_rate(network, everything, noise, rows, self.search_batch_size)
        self.keep(noise, everything.index)
        return {"error": error}

    def _noise(self, network: nn.Module, image: Tensor, label: Tensor, index: Tensor, seed: int) -> Tensor:
        """New noise δ for a batch: all transforms of a step run as one batch."""
        labels = label.repeat(self.samples)
        shape = tuple(image.shape[1:])

        def gradient(now: Tensor, t: int) -> Tensor:
            now = now.detach().requires_grad_()
            keys = [mix_seed(seed, t, sample) for sample in range(self.samples)]
            views = [random_crops(now, index, key, self.crop, self.flip) for key in keys]
            seen = torch.cat(views)
            start = torch.cat([uniform_noise(mix_seed(key, 1), index, shape, self.attack_radius) for key in keys])
            at = self._climb(network, seen.detach(), labels, start)
            # the gradient at the adversarial point goes back through the transforms alone
            (found,) = torch.autograd.grad(seen, now, input_gradient(network, at, labels))
            return found

        start = uniform_noise(mix_seed(seed, 2**32), index, shape, self.radius)
        return sign_descent(gradient, image, start, self.radius, self.step, self.steps)

    def _attacked(self, network: nn.Module, image: Tensor, label: Tensor, index: Tensor, seed: int) -> Tensor:
        start = uniform_noise(mix_seed(seed, 1), index, tuple(image.shape[1:]), self.attack_radius)
        return self._climb(network, image, label, start)

    def _climb(self, network: nn.Module, image: Tensor, label: Tensor, start: Tensor) -> Tensor:
        """Adversarial examples of images in pixel units."""
        if not self.attack_radius:
            return image
        found = sign_descent(
            lambda now, t: input_gradient(network, now, label),
            image,
            start,
            self.attack_radius,
            -self.attack_step,
            self.attack_steps,
        )
        return (image + found).clamp_(0, 255)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        attack = ("attack_radius", "attack_step", "attack_steps", "crop", "flip")
        names = ("steps", "samples", *attack, "train_steps", "perturb_every", "decay_every")
        return super().describe() | {name: getattr(self, name) for name in names}
