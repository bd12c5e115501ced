"""JiT: forget samples lose their grip when the output no longer reacts to small changes of the image.

Source: Foster et al., "Zero-Shot Machine Unlearning at Scale via Lipschitz Regularization", 2024,
https://arxiv.org/abs/2402.01401.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_above, check_at_least
from torchlethe.data import Single, mix_seed, model_input
from torchlethe.data.hashing import random_normal
from torchlethe.functional.forget_losses import lipschitz_ratio
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory


def jit_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with learning rate 1e-3, without momentum or weight decay."""
    return SGD(parameters, lr=1e-3)


class JiTUpdate(LossUpdate):
    """Descent on the local Lipschitz constant at the forget samples; reads nothing else, and no labels.

    Args:
        optimizer: makes the optimizer from the parameters.
        draws: noisy copies of each image in a step, at least 1.
        sigma: standard deviation of the noise, in units of pixels in [0, 1], above 0.
        seed: seed of the noise.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the forget batches, clean and noisy ones:
            ``train``, or ``eval``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        The noise is a pure function of (seed, draw, pass, index of the sample), so ranks and resumed runs agree; for
        batches without an index it is one of (seed, draw, step, position).
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = jit_optimizer,
        draws: int = 10,
        sigma: float = 0.1,
        seed: int = 0,
        bn_mode: BatchNormMode = "eval",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_at_least(1, draws=draws)
        check_above(0, sigma=sigma)
        self.draws, self.sigma, self.seed = draws, sigma, seed
        self.feed = Single("forget")

    def noise(self, batch: Any, k: int, draw: int) -> Tensor:
        """The noise of one draw for a batch, in the images' shape and dtype."""
        image = batch["image"]
        index = batch.get("index")
        epoch = batch["epoch"] if index is not None and "epoch" in batch else k
        if index is None:
            index = torch.arange(len(image), device=image.device)
        seed = mix_seed(self.seed, *b"noise", draw)
        return self.sigma * random_normal(seed, epoch, index, tuple(image.shape[1:])).to(image.dtype)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean ratio of output change to input change."""
        batch = model_input(batch)
        image = batch["image"]
        with self.batch_norm(network, "forget"):
            logits = network(image)
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            ratios = []
            for draw in range(self.draws):
                noise = self.noise(batch, k, draw)
                with torch.no_grad():
                    noisy = network(image + noise)
                ratios.append(lipschitz_ratio(logits, noisy.to(logits.dtype), noise.to(logits.dtype)))
        loss = torch.stack(ratios).mean()
        forget = nn.functional.cross_entropy(logits.detach(), batch["label"])
        return loss, {"forget_loss": forget, "lipschitz_ratio": loss.detach()}
