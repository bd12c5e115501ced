"""MU-Mis: forgetting without any remaining data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from torchlethe.components import eval_mode
from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import MUMisUpdate
from torchlethe.updates.mu_mis import plain_sgd


class MUMis(UnlearningModule):
    """Make a classifier forget by lowering the sensitivity of its true logit to the forget images, and nothing else.

    Cheng et al., ICLR 2026, https://arxiv.org/abs/2402.15109. Training raises the gradient of a sample's true logit
    with respect to its image above those of the other logits; the loss ‖∇ₓf_c‖² - ‖∇ₓf_c'‖² takes that back. Only the
    forget set is read. The run ends by itself when the irrelevant sensitivity, which first dips, has recovered, and
    takes the weights back when it has risen past ``guard``: beyond that the loss, which has no lower bound, destroys
    the network.

    Args:
        network: the trained classifier, maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes.
        weights: file with the original model's weights.
        steps: most steps that a run takes.
        rho: share of the squared target sensitivity that the first step removes to first order, above 0; it sets the
            learning rate. None leaves the optimizer its own.
        optimizer: makes the optimizer; with ``rho`` it must be SGD.
        delta: ratio of irrelevant sensitivity, now to before, from which a run may stop, above 0.
        min_dip: dip below 1 that the ratio must have shown before, in [0, 1]; 0 is the published rule, 1 never stops.
        guard: ratio past which the run is taken back and stopped, above 1.
        monitor_every: steps between two looks at the ratio; by default a pass over the forget set, and at most 5.
        monitor_samples: most forget images that are looked at.
        weighting: ``plain``, the published loss, or ``hinge``, which stops pushing a sample that has got there.
        kappa: goal of ``hinge`` for the target sensitivity, as a multiple of the mean irrelevant one at the start.
        n_irrelevant: number of other classes in a sample's loss, each with its squared norm.
        irrelevant_sampling: other classes drawn anew in each step (``uniform``), once (``fixed``), or those with the
            largest logits (``top``).
        bn_mode: BatchNorm in ``eval`` mode; ``train`` mixes the samples of a batch and moves the statistics towards the
            forget set, for comparison only.
        fold_bn: exact short cuts that make a step faster: folded BatchNorm and no passes over zeros.
        seed: seed of the other classes.

    Raises:
        ValueError: an argument is out of range, the weights are of half precision, or an operation of the network has
            no second derivative.

    Note:
        Manual optimization; one batch is one ``global_step``. Images are not augmented, and dropout and BatchNorm are
        in eval mode. Steps run in float32 (or float64) also under bf16-mixed, and without compiled or fused kernels,
        which have no second derivative. Under DDP gradients, sensitivities and the decision to stop are those of one
        process with the joined batches.

    Example:
        >>> from torchlethe.models import MLP
        >>> sorted(MUMis(MLP(), num_classes=10).reads)
        ['forget']
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        steps: int = 500,
        rho: float | None = 0.03,
        optimizer: OptimizerCallable = plain_sgd,
        delta: float = 1.0,
        min_dip: float = 0.02,
        guard: float = 1.25,
        monitor_every: int | None = None,
        monitor_samples: int = 512,
        weighting: Literal["plain", "hinge"] = "plain",
        kappa: float = 1.0,
        n_irrelevant: int = 1,
        irrelevant_sampling: Literal["uniform", "fixed", "top"] = "uniform",
        bn_mode: Literal["eval", "train"] = "eval",
        fold_bn: bool = True,
        seed: int = 0,
    ) -> None:
        update = MUMisUpdate(
            steps=steps,
            rho=rho,
            optimizer=optimizer,
            delta=delta,
            min_dip=min_dip,
            guard=guard,
            monitor_every=monitor_every,
            monitor_samples=monitor_samples,
            weighting=weighting,
            kappa=kappa,
            n_irrelevant=n_irrelevant,
            irrelevant_sampling=irrelevant_sampling,
            bn_mode=bn_mode,
            fold_bn=fold_bn,
            seed=seed,
        )
        super().__init__(network, num_classes, update, weights)

    def on_fit_start(self) -> None:
        """Leave the network's modes as they are: steps use eval mode by themselves."""
        with eval_mode(self.network):
            super().on_fit_start()

    def on_train_end(self) -> None:
        """Say why the run ended."""
        super().on_train_end()
        reason = self.update.stop_reason or "steps"  # type: ignore[attr-defined]
        rank_zero_info(f"MUMis ended after {self.global_step} steps, reason: {reason}.")
