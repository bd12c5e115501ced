"""The first universal perturbation: the sum of the smallest steps across the decision border, image after image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.updates.attacks.base import UniversalAttack


class DeepFoolAttack(UniversalAttack):
    """For each image that x + v does not fool: v ← proj(v + DeepFool(x + v)).

    Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, and DeepFool, CVPR 2016.
    Images are taken one after the other, as published; predictions are asked for a whole batch at a time, and one
    DeepFool iteration is one pass over as many copies of the image as there are classes in question. As in ART, v
    changes only where the prediction really does.

    Args:
        classes: how many of the most probable classes DeepFool looks at, at least 2.
        overshoot: how far beyond the border a step goes, as a share of its length.
        max_iterations: of DeepFool for one image.

    Raises:
        ValueError: an argument is out of range.
    """

    clean: ClassVar[frozenset[str]] = frozenset({"logits"})
    learns_by_loss: ClassVar[bool] = False

    def __init__(self, classes: int = 10, overshoot: float = 0.02, max_iterations: int = 50) -> None:
        check_at_least(2, classes=classes)
        check_at_least(1, max_iterations=max_iterations)
        check_at_least(0, overshoot=overshoot)
        super().__init__()
        self.classes, self.overshoot, self.max_iterations = classes, overshoot, max_iterations

    def step(self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int) -> dict[str, Any]:
        """Go through a batch; the share of images that asked for a step is logged."""
        image, clean = batch["image"], batch["clean_logits"].argmax(1)
        place = updates = 0
        while place < len(image):
            with torch.no_grad():
                fooled = network(noise(image[place:])).logits.argmax(1) != clean[place:]
            left = (~fooled).nonzero().flatten()
            if not len(left):
                break
            place += int(left[0])
            moved = noise(image[place : place + 1]).detach()
            change = self.smallest_step(network, moved, int(clean[place]))
            if change is not None:
                with torch.no_grad():
                    noise.v.add_(change.to(noise.v))
                noise.project_()
                updates += 1
            place += 1
        return {"updates": updates / len(image)}

    def smallest_step(self, network: SplitNetwork, image: Tensor, label: int) -> Tensor | None:
        """DeepFool: the smallest change (1, C, H, W) of an image that changes its class; None where it found none.

        In each iteration, for each other class k: w = ∇f_k − ∇f_0, f = f_k − f_0; the step goes to the nearest
        linearised border, (|f| / ‖w‖²)·w.

        Args:
            network: the classifier.
            image: (1, C, H, W).
            label: its class f_0.
        """
        with torch.no_grad():
            order = network(image).logits[0].argsort(descending=True)
        count = min(self.classes, len(order))
        asked = torch.cat([order.new_tensor([label]), order[order != label][: count - 1]])
        total = torch.zeros_like(image)
        for iteration in range(self.max_iterations + 1):
            copies = (image + (1 + self.overshoot) * total).expand(count, *image.shape[1:]).clone().requires_grad_()
            with torch.enable_grad():
                logits = network(copies).logits
                chosen = logits[torch.arange(count, device=logits.device), asked]
                (gradient,) = torch.autograd.grad(chosen.sum(), copies)
            if int(logits[0].argmax()) != label:
                return (1 + self.overshoot) * total
            if iteration == self.max_iterations:  # the last step is judged too
                break
            w = (gradient[1:] - gradient[:1]).float()
            f = (chosen[1:] - chosen[0]).detach().float().abs()
            norms = w.flatten(1).norm(dim=1).clamp(min=1e-12)
            nearest = int((f / norms).argmin())
            total = total + ((f[nearest] + 1e-4) / norms[nearest].square() * w[nearest : nearest + 1]).to(total)
        return None
