"""SFRon for classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.lightning_modules.unlearning.base import UnlearningModule
from torchlethe.updates import SFRonUpdate
from torchlethe.updates.base import default_optimizer
from torchlethe.updates.sfron import MaskRule


class SFRon(UnlearningModule):
    """Saliency forgetting in the remain-preserving manifold, online (Huang et al., NeurIPS 2024).

    Every ``forget_every`` iterations a forgetting step ascends the adaptively weighted loss of a forget batch on the
    salient weights; every iteration a repair step descends on a remaining batch. The defaults are the official ones
    for CIFAR-10, ResNet-18 and a random 10 % (https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry).
    When little is forgotten, raise ``alpha`` or lower ``forget_every`` first.

    Args:
        network: the trained classifier, maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes.
        weights: file with the original model's weights.
        steps: number K of iterations, each with one remaining batch.
        forget_every: iterations T from one forgetting step to the next.
        optimizer: makes the optimizer of both kinds of step.
        forget_optimizer: makes a separate optimizer for the forgetting steps (the DualOptim recipe).
        lr_schedule: ``cosine`` over ``steps``, or ``constant``.
        alpha: strength of the forgetting ascent, above 0; or ``auto``: trial runs before the first step find the
            strength at which the loss on the forget set reaches ``auto_alpha_target``; their time is preparation.
        auto_alpha_steps: iterations of such a trial run.
        auto_alpha_target: a mean loss in nats; by default that of the validation images, which the network must not
            have been trained on.
        schedule: how alpha falls over the run: ``cosine``, ``linear``, ``expdecay`` or ``constant``.
        coefficients: ``adaptive`` sample weights (low-loss samples first), or ``uniform``.
        lam: exponent of the adaptive weights, in [0, 1].
        loss_floor: lower bound on the loss inside a sample's weight; 0 is the official code, where a sample with loss
            exactly 0 silences its batch.
        clip: largest norm of the masked forgetting gradient.
        mask: ``ratio`` of the Fisher informations on forget set and remaining data against gamma, ``top`` (the weights
            with the largest ratio), ``none``, or a function from both (dicts by parameter name) to a
            :class:`~torchlethe.components.SaliencyMask`.
        gamma: threshold of the ratio, at least 0.
        mask_fraction: share of the weights that a ``top`` mask keeps, in [0, 1].
        fisher: squared ``batch``-mean gradients as published, or per ``sample``, see
            :class:`~torchlethe.components.DiagonalFisher`.
        fisher_augment: measure it on shuffled, augmented batches as the official code does, instead of fixed ones.
        fisher_stride: use every so many-th remaining batch for its Fisher information; 1 uses all.
        fisher_chunk: samples whose gradients are held at once in ``sample`` mode.
        strict_mask: hold masked weights exactly in forgetting steps, against weight decay and momentum.
        slow_beta: share of the new weights in the slow update, in [0, 1]; 1 switches it off, as published.
        slow_every: slow update after each ``step``, or once a ``cycle`` of ``forget_every`` iterations.
        bn_forget: whether BatchNorm uses (and updates) statistics of forget batches: ``train`` or ``eval``.
        cosine_every: log the cosine between forgetting and repair gradient every so many forgetting steps; 0 never.

    Raises:
        ValueError: an argument is out of range, or the precision is fp16.

    Note:
        Manual optimization; one batch is one ``global_step`` and the run stops after ``steps``. Under DDP the sample
        weights are normalised over all ranks and the Fisher information equals one process with the joined batches.

    Example:
        >>> from torchlethe.models import MLP
        >>> module = SFRon(MLP(), num_classes=10, steps=100, alpha=10.0)
        >>> sorted(module.reads)
        ['forget', 'remain']
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        steps: int = 1500,
        forget_every: int = 5,
        optimizer: OptimizerCallable = default_optimizer,
        forget_optimizer: OptimizerCallable | None = None,
        lr_schedule: Literal["cosine", "constant"] = "cosine",
        alpha: float | Literal["auto"] = 25.0,
        auto_alpha_steps: int = 50,
        auto_alpha_target: float | None = None,
        schedule: Literal["cosine", "linear", "expdecay", "constant"] = "cosine",
        coefficients: Literal["adaptive", "uniform"] = "adaptive",
        lam: float = 0.5,
        loss_floor: float = 1e-6,
        clip: float = 7.0,
        mask: Literal["ratio", "top", "none"] | MaskRule = "ratio",
        gamma: float = 1.0,
        mask_fraction: float = 0.5,
        fisher: Literal["batch", "sample"] = "batch",
        fisher_augment: bool = False,
        fisher_stride: int = 1,
        fisher_chunk: int = 64,
        strict_mask: bool = False,
        slow_beta: float = 1.0,
        slow_every: Literal["step", "cycle"] = "step",
        bn_forget: Literal["train", "eval"] = "train",
        cosine_every: int = 0,
    ) -> None:
        update = SFRonUpdate(
            steps=steps,
            forget_every=forget_every,
            optimizer=optimizer,
            forget_optimizer=forget_optimizer,
            lr_schedule=lr_schedule,
            alpha=alpha,
            auto_alpha_steps=auto_alpha_steps,
            auto_alpha_target=auto_alpha_target,
            schedule=schedule,
            coefficients=coefficients,
            lam=lam,
            loss_floor=loss_floor,
            clip=clip,
            mask=mask,
            gamma=gamma,
            mask_fraction=mask_fraction,
            fisher=fisher,
            fisher_augment=fisher_augment,
            fisher_stride=fisher_stride,
            fisher_chunk=fisher_chunk,
            strict_mask=strict_mask,
            slow_beta=slow_beta,
            slow_every=slow_every,
            bn_forget=bn_forget,
            cosine_every=cosine_every,
        )
        super().__init__(network, num_classes, update, weights)
