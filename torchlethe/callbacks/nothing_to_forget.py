"""A warning before unlearning when the network gives no sign of ever having seen the forget set."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.components import all_reduce_sum, eval_mode
from torchlethe.data import PADDING_LABEL, PositionedLoader


class NothingToForget(Callback):
    """Warn at the start of unlearning when the network does no better on the forget set than on unseen images.

    Looks at evenly spread images of the forget set and of the test set, in eval mode, before the first step:

    * of classes that do not remain, a network that never saw them predicts (nearly) none: it warns when the accuracy on
      the forget set is no higher than a guess among all classes, within two standard errors;
    * else a network remembers what it was trained on: it warns when the mean loss on the forget set is not at least two
      standard errors below that on the test images (of the forgotten subclasses, where the test set knows them).
      Samples with a label that is known to be wrong are left out, as test labels are clean.

    Either the weights or the request are the wrong ones, or the network generalises so well that there is nothing to be
    measured. The run goes on. The command adds this callback to every fit of a method that reads the forget set.

    Args:
        samples: images of each set that are looked at, at most; 0 switches it off.

    Raises:
        ValueError: ``samples`` is negative.

    Note:
        Needs an :class:`~torchlethe.datamodules.UnlearningDataModule`, without one it does nothing; so for a module
        that does not read the forget set, and in a resumed run. Under DDP each rank passes its share, and the sums are
        joined. Randomness that training uses is left untouched.

    Example:
        >>> NothingToForget(samples=256).samples
        256
    """

    def __init__(self, samples: int = 512) -> None:
        check_at_least(0, samples=samples)
        self.samples = samples

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and warn."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        reads: Any = getattr(pl_module, "reads", ())
        known = hasattr(datamodule, "role_set") and hasattr(datamodule, "evaluation_loaders")
        if not self.samples or not known or "forget" not in reads or trainer.global_step:
            return
        with isolate_rng(), torch.no_grad(), eval_mode(pl_module):
            message = self._judge(trainer, pl_module, datamodule)
        if message and trainer.is_global_zero:
            warnings.warn(f"nothing to forget? {message}.", stacklevel=2)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, datamodule: Any) -> str | None:
        loaders = datamodule.evaluation_loaders()
        forget = self._measure(trainer, pl_module, datamodule, loaders["forget"])
        count, loss, square, right = forget.tolist()
        if not torch.isin(datamodule.role_set("forget").labels, datamodule.role_set("remain").labels).any():
            chance = 1 / datamodule.num_classes
            if right / count > chance + 2 * math.sqrt(chance * (1 - chance) / count):
                return None
            return (
                f"the network knows {100 * right / count:.1f} % of the forget images, no more than a guess among "
                f"{datamodule.num_classes} classes, as if it had not been trained on these classes: check weights and "
                "forget request"
            )
        name = "test_forget" if "test_forget" in loaders else "test"
        if name not in loaders:
            return None  # an empty test set: there is nothing to compare with
        unseen, other, other_square, _ = self._measure(trainer, pl_module, datamodule, loaders[name]).tolist()
        means = loss / count, other / unseen
        errors = (square / count - means[0] ** 2) / count + (other_square / unseen - means[1] ** 2) / unseen
        if means[1] - means[0] >= 2 * math.sqrt(max(errors, 0.0)) and means[0] < means[1]:
            return None
        return (
            f"the network's mean loss is {means[0]:.3g} on the forget images and {means[1]:.3g} on test images, no "
            "sign that it was trained on the former: either weights or forget request are the wrong ones, or it "
            "generalises so well that there is little to forget"
        )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, datamodule: Any, loader: Any) -> Tensor:
        """Count, sum of losses, sum of their squares, and hits, over all ranks."""
        dataset = loader.dataset
        # where noise on the labels is known, samples with a wrong one are no match for clean test samples
        clean = (dataset.labels == dataset.clean_labels).nonzero().flatten()
        candidates = clean if len(clean) else torch.arange(len(dataset))
        chosen = candidates[torch.linspace(0, len(candidates) - 1, min(len(candidates), self.samples)).round().long()]
        few = PositionedLoader(dataset.subset(chosen), loader.batch_size, **(trainer.distributed_sampler_kwargs or {}))
        sums = torch.zeros(4, dtype=torch.float64, device=pl_module.device)
        for raw in few:
            batch = datamodule.prepare_batch(raw, pl_module.device)
            with trainer.precision_plugin.forward_context():
                logits = pl_module(trainer.precision_plugin.convert_input(batch["image"]))
            label = batch["label"]
            real = (label != PADDING_LABEL).to(sums.dtype)
            losses = torch.nn.functional.cross_entropy(
                logits.to(sums.dtype), label, reduction="none", ignore_index=PADDING_LABEL
            )
            hits = (logits.argmax(1) == label).to(sums.dtype) * real
            sums += torch.stack([real.sum(), losses.sum(), losses.square().sum(), hits.sum()])
        return all_reduce_sum(sums)
