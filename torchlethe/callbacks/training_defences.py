"""Defences that change the batch before a training step: adversarial training, and UEraser's hardest view."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from torchlethe.arguments import check_above, check_at_least
from torchlethe.components import eval_mode, frozen_statistics
from torchlethe.data import PADDING_LABEL, model_input
from torchlethe.data.batches import IMAGE_KEYS
from torchlethe.data.erasing import ErasingAugmentation
from torchlethe.data.hashing import random_normal
from torchlethe.functional.sign_descent import sign_descent


class BatchDefence(Callback):
    """Base of the callbacks that give a training step other images.

    The images of the batch are replaced in place, in the batch that Lightning hands to ``training_step`` next, so any
    module with automatic optimization whose ``forward(image)`` gives logits is trained this way, with its own loss.
    Batches are dicts with ``image`` and ``label``, or lists (as PyTorch's loaders give for pairs).

    Args:
        seed: what is drawn is a function of seed, step and each sample's ``index`` (its place in the batch where there
            is none), so ranks and resumed runs draw what one uninterrupted process draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules that take the steps themselves: they may pass a batch several times."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} needs automatic optimization, {type(pl_module).__name__} optimises by itself."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Replace the images."""
        if not isinstance(batch, dict | list):
            raise ValueError(
                f"{type(self).__name__} replaces images in a dict or list, the batch is a {type(batch).__name__}."
            )
        found = model_input(batch)
        image, label = found["image"], found["label"]
        if not torch.is_floating_point(image) or image.ndim != 4:
            raise ValueError(f"{type(self).__name__} needs images (B, C, H, W) in [0, 1], the batch has {image.dtype}.")
        index = found.get("index")
        if index is None:
            index = torch.arange(len(image), device=image.device) * trainer.world_size + trainer.global_rank
        with trainer.precision_plugin.forward_context():
            new = self.replace(trainer, pl_module, image.detach(), label, index).to(image.dtype)
        if isinstance(batch, dict):
            batch[next(name for name in IMAGE_KEYS if name in batch)] = new
        else:
            batch[0] = new

    def replace(
        self, trainer: Trainer, pl_module: LightningModule, image: Tensor, label: Tensor, index: Tensor
    ) -> Tensor:
        """The images to train on instead: (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    @staticmethod
    def step(trainer: Trainer) -> int:
        """The number of the batch in the whole fit."""
        return trainer.fit_loop.total_batch_idx


class AdversarialTraining(BatchDefence):
    """Train on PGD examples (Madry et al., ICLR 2018), the strongest simple defence against small perturbations.

    Each image starts at x + ``step_size`` · N(0, 1) and climbs the cross-entropy by signed gradients inside the ball
    ‖δ‖∞ ≤ ``epsilon`` and [0, 1]; the network is in eval mode meanwhile and in train mode for the step itself.

    Args:
        epsilon: radius in units of 1/255.
        step_size: in units of 1/255.
        steps: gradient steps; each costs a forward and a backward pass.
        seed: seed of the starts.

    Raises:
        ValueError: an argument is out of range, or the module optimises by itself.

    Note:
        Under DDP every rank attacks its own images; no gradients of the attack are exchanged. The attack's arithmetic
        is in float32.
    """

    def __init__(self, epsilon: float = 8.0, step_size: float = 2.0, steps: int = 10, seed: int = 0) -> None:
        super().__init__(seed)
        check_above(0, epsilon=epsilon, step_size=step_size, steps=steps)
        self.epsilon, self.step_size, self.steps = epsilon, step_size, steps

    def replace(
        self, trainer: Trainer, pl_module: LightningModule, image: Tensor, label: Tensor, index: Tensor
    ) -> Tensor:
        """The adversarial images."""
        clean = image.float() * 255
        noise = random_normal(self.seed, self.step(trainer), index, tuple(clean.shape[1:])).to(clean.device)
        start = (self.step_size * noise).clamp(-self.epsilon, self.epsilon)

        def gradient(x: Tensor, t: int) -> Tensor:
            pixels = (x / 255).to(image.dtype).requires_grad_(True)
            # a sum, so that no image's gradient depends on the others
            loss = F.cross_entropy(pl_module(pixels).float(), label, reduction="sum", ignore_index=PADDING_LABEL)
            return torch.autograd.grad(loss, pixels)[0].float()

        with eval_mode(pl_module), torch.enable_grad():
            delta = sign_descent(gradient, clean, start, self.epsilon, -self.step_size, self.steps)
        return (clean + delta).clamp_(0, 255) / 255


class UEraser(BatchDefence):
    """Train each image as the one of several strong augmentations that the network finds hardest (Qin et al., 2023).

    The ``samples`` views of an image are compared by their loss, with the statistics of the batch and without
    gradients; then the module's own training step sees the hardest. The published code takes gradients of all views and
    keeps the largest loss; here the step sees the same views at the cost of ``samples`` forward passes in place of
    ``samples`` − 1 forward and backward passes (BatchNorm's statistics then come from the hardest views together).

    Args:
        samples: views in the first epochs.
        epochs: number of epochs with so many views; one view afterwards.
        augmentation: draws a view; plasma brightness and contrast, channel shuffle and TrivialAugment by default.
        seed: seed of the views.

    Raises:
        ValueError: an argument is out of range, or the module optimises by itself.

    Note:
        Under DDP each rank chooses among the views of its own images.
    """

    def __init__(
        self,
        samples: int = 5,
        epochs: int = 50,
        augmentation: ErasingAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        check_at_least(1, samples=samples)
        check_at_least(0, epochs=epochs)
        self.samples, self.epochs = samples, epochs
        self.augmentation = augmentation if augmentation is not None else ErasingAugmentation()

    @torch.no_grad()
    def replace(
        self, trainer: Trainer, pl_module: LightningModule, image: Tensor, label: Tensor, index: Tensor
    ) -> Tensor:
        """The hardest views."""
        count = self.samples if trainer.current_epoch < self.epochs else 1
        step, worst, hardest = self.step(trainer), image, None
        with frozen_statistics(list(pl_module.modules())):
            for number in range(count):
                view = self.augmentation(image.float(), index, step, self.seed + number).to(image.dtype)
                if count == 1:
                    return view
                loss = F.cross_entropy(pl_module(view).float(), label, reduction="none", ignore_index=PADDING_LABEL)
                if hardest is None:
                    worst, hardest = view, loss
                else:
                    harder = loss > hardest
                    worst = torch.where(harder[:, None, None, None], view, worst)
                    hardest = torch.maximum(hardest, loss)
        return worst
