"""Error-minimising noise (EM): images from which a network seems to have nothing left to learn."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_choice, check_within
from torchlethe.components import gradients_on
from torchlethe.functional.sign_descent import sign_descent
from torchlethe.updates.protection.base import Batches, Reduce
from torchlethe.updates.protection.frozen import frozen
from torchlethe.updates.protection.joint_noise import JointNoiseProtector, error_rate, input_gradient
from torchlethe.updates.protection.settings import own_training_state, progress
from torchlethe.updates.protection.whole_set import WholeSet


class ErrorMinimizingProtector(JointNoiseProtector):
    """EM: min over θ and δ of CE(h_θ(x + δ), y), by turns, until the network is right on almost all of x + δ.

    Huang et al., "Unlearnable Examples", ICLR 2021, HanxunH/Unlearnable-Examples. A round is ``train_steps`` SGD steps
    on x + δ in train mode, then ``steps`` signed steps of the noise of every image in eval mode; δ goes on from its
    last value. ``emax`` ascends in place of descending, against a trained network that stays as it is.

    Args:
        network: for ``emin`` the architecture; for ``emax`` a trained network.
        num_classes: K.
        objective: ``emin`` or ``emax``.
        noise_of: ``sample``, noise for each image; or ``class``, for each class: the mean of what the steps make of its
            images, batch by batch, which protects new images of the class too.
        radius: ε in units of 1/255.
        step: α in units of 1/255.
        steps: steps of the noise in a round; by default 20, for classes 1.
        train_steps: SGD steps in a round.
        rounds: rounds at most; if they end first, a warning says so.
        stop_error: error on x + δ below which (``emax``: 1 − error) the rounds end; by default 0.01, for classes 0.1.
        share: share of the images that class noise is learned on; by default 1 for images, 0.2 for classes.
        lr: learning rate of the network's SGD.
        momentum: its momentum.
        weight_decay: its weight decay.
        clip: largest norm of the network's gradient; 0 does not clip.
        batch_size: images of a training batch, and of a batch of class noise.
        search_batch_size: images whose noise is searched at a time.
        seed: seed of weights, batches and noise.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        objective: Literal["emin", "emax"] = "emin",
        noise_of: Literal["sample", "class"] = "sample",
        radius: int = 8,
        step: float = 0.8,
        steps: int | None = None,
        train_steps: int = 10,
        rounds: int = 100,
        stop_error: float | None = None,
        share: float | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        clip: float = 5.0,
        batch_size: int = 128,
        search_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(network, radius, step, lr, momentum, weight_decay, clip, batch_size, search_batch_size, seed)
        check_choice(("emin", "emax"), objective=objective)
        check_choice(("sample", "class"), noise_of=noise_of)
        self.objective, self.noise_of, self.num_classes = objective, noise_of, num_classes
        classwise = noise_of == "class"
        self.steps = (1 if classwise else 20) if steps is None else steps
        self.stop_error = (0.1 if classwise else 0.01) if stop_error is None else float(stop_error)
        self.share = (0.2 if classwise else 1.0) if share is None else float(share)
        self.train_steps, self.rounds = train_steps, rounds
        check_at_least(1, steps=self.steps, train_steps=train_steps, rounds=rounds)
        check_at_least(2, num_classes=num_classes)
        check_at_least(0, stop_error=self.stop_error)
        check_within(0, 1, "(]", share=self.share)
        if not classwise and self.share != 1:
            raise ValueError(f"share is {share}, but noise_of is 'sample': each image needs noise of its own.")

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Learn the noise; see :meth:`Protection.prepare`.

        Returns:
            ``rounds``, and ``error`` on x + δ at the end.
        """
        with gradients_on(), own_training_state(device, self.seed):
            everything = WholeSet(data, device).subset(self.share, self.seed)
            classwise = self.noise_of == "class"
            count = self.num_classes if classwise else len(everything)
            noise = torch.zeros(count, *everything.image.shape[1:], device=device)
            rows = everything.label if classwise else torch.arange(count, device=device)
            trains = self.objective == "emin"
            network = (
                self.fresh_network(device) if trains else copy.deepcopy(self.networks["network"]).to(device).float()
            )
            optimizer = self.optimizer(network)
            done, error = 0, 1.0
            parts = {"network": network, "optimizer": optimizer, "noise": noise}
            if (state := self.snapshots.resume(device, **parts)) is not None:
                done, error = state["done"], state["error"]
                del state
            batches = everything.training_rows(self.batch_size, self.seed, done * self.train_steps if trains else 0)
            with progress("error-minimising noise", self.rounds, done) as advance:
                while done < self.rounds and not self._ended(error, done):
                    for _ in range(self.train_steps if trains else 0):
                        part = next(batches)
                        image = (everything.image[part].float() + noise[rows[part]]).clamp_(0, 255)
                        self.train_step(network, optimizer, image, everything.label[part])
                    with frozen(network):
                        self._search(network, everything, noise, rows)
                        error = error_rate(network, everything, noise, rows, self.search_batch_size)
                    done += 1
                    advance(f"(error {error:.1%})")
                    self.snapshots.offer(device, **parts, done=done, error=error)
        if self.stop_error and not self._ended(error, done):
            warnings.warn(
                f"after rounds={self.rounds} the network's error on the noised images is {error:.1%}, and "
                f"stop_error={self.stop_error} was not reached: the noise may be weak.",
                stacklevel=2,
            )
        self.keep(noise, torch.zeros(0, dtype=torch.int64, device=device) if classwise else everything.index)
        return {"rounds": float(done), "error": error}

    def _ended(self, error: float, done: int) -> bool:
        return done > 0 and (error if self.objective == "emin" else 1 - error) < self.stop_error

    def _search(self, network: nn.Module, data: WholeSet, noise: Tensor, rows: Tensor) -> None:
        step = self.step if self.objective == "emin" else -self.step
        classwise = self.noise_of == "class"
        for part in data.rows(self.batch_size if classwise else self.search_batch_size):
            image, label = data.image[part].float(), data.label[part]

            def gradient(now: Tensor, t: int, label: Tensor = label) -> Tensor:
                return input_gradient(network, now, label)

            found = sign_descent(gradient, image, noise[rows[part]], self.radius, step, self.steps)
            if classwise:
                # where a class is in the batch, its noise becomes the mean over its images
                number = torch.bincount(label, minlength=self.num_classes)
                total = torch.zeros_like(noise).index_add_(0, label, found)
                mean = total / number.clamp_min(1)[:, None, None, None]
                noise.copy_(torch.where((number > 0)[:, None, None, None], mean, noise))
            else:
                noise[part] = found

    def rows(self, label: Tensor, index: Tensor) -> Tensor:
        """The image's own row, or its class's."""
        return label if self.noise_of == "class" else super().rows(label, index)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Protection.describe`."""
        names = ("objective", "noise_of", "num_classes", "steps", "train_steps", "rounds", "stop_error", "share")
        return super().describe() | {name: getattr(self, name) for name in names}
