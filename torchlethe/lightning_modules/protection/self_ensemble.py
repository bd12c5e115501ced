"""SEP as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection.self_ensemble import SelfEnsembleProtector, Variant


class SelfEnsembleProtection(ProtectionModule):
    """Self-ensemble protection: push each image until all checkpoints of one training run see another class in it.

    Chen et al., "Self-Ensemble Protection: Training Checkpoints Are Good Data Protectors", ICLR 2023. First train on
    the clean set with the callback :class:`~torchlethe.callbacks.CheckpointEnsemble`, then ``predict``::

        lethe fit --config configs/digits/protect_data.yaml --config configs/digits/ensemble.yaml
        lethe predict --config configs/digits/protect_data.yaml --config configs/digits/sep.yaml --model.ensemble …

    ``sep`` descends on the cross-entropy to a wrong class, averaged over the checkpoints; ``sep_fa`` on the distance of
    the features to that class's mean feature; ``sep_fa_vr`` does so with the inner loop of stochastic variance reduced
    ensembles. All arithmetic on pixels is done in whole numbers, so that the result is exact in 8 bits whatever the
    precision of the network. Protection deters; it is no guarantee (JPEG compression undoes much of it).

    Args:
        network: a classifier that gives the architecture; its own weights do not matter.
        num_classes: number of classes.
        ensemble: the folder that ``CheckpointEnsemble`` wrote.
        variant: ``sep``, ``sep_fa`` or ``sep_fa_vr``.
        radius: ε, largest change of a pixel value, in units of 1/255.
        step: α, in units of 1/255.
        steps: T.
        checkpoints: N, chosen at equal distances from the ensemble's, the last one among them. The paper's code uses 30
            of 120, and 15 for ``sep_fa_vr``.
        inner_steps: M, for ``sep_fa_vr`` alone; the official code has 16 as its default and 15 in its job list.
        target: the wrong class of class 0, of class 1, …; by default the class K/2 further on, cyclically.
        labels: ``given``, or ``predicted`` where the owner's labels are not known or not to be used: each image is
            pushed away from the class that the last checkpoint sees in it. Written labels stay those of the data.
        compat: ``fixed``, or ``official`` for two mistakes of the published code (its first checkpoint's class means
            are taken in train mode; inner gradients aim at the last checkpoint's class means), to reproduce its bytes.
        seed: seed of the checkpoints that ``sep_fa_vr`` draws.
        resident: keep all N checkpoints on the device. Otherwise each is read from its file whenever it is needed, so
            that memory does not grow with N: best for large batches.
        vectorised: run the N checkpoints as one vectorised model, all resident: faster for small networks on a CPU.
        compiled: compile the network's pass once for all checkpoints, with ``torch.compile``; only for a
            :class:`torchlethe.models.FeatureNetwork`, such as Lethe's own networks.
        cache_dir: where class means are kept for later runs, see
            :class:`~torchlethe.lightning_modules.protection.base.ProtectionModule`.
        cache: whether to keep them.

    Raises:
        FileNotFoundError: the ensemble does not exist.
        ValueError: an argument is out of range, or the ensemble's files are damaged or fit another network.

    Note:
        Under DDP each rank protects its share of the images; class means are summed over ranks. Networks run in eval
        mode. Precision: 32-true, 64-true or bf16-mixed.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ensemble: str | Path,
        variant: Variant = "sep",
        radius: int = 2,
        step: int = 1,
        steps: int = 30,
        checkpoints: int = 30,
        inner_steps: int = 15,
        target: list[int] | None = None,
        labels: Literal["given", "predicted"] = "given",
        compat: Literal["fixed", "official"] = "fixed",
        seed: int = 0,
        resident: bool = False,
        vectorised: bool = False,
        compiled: bool = False,
        cache_dir: str | Path | None = None,
        cache: bool = True,
    ) -> None:
        protection = SelfEnsembleProtector(
            network,
            num_classes,
            ensemble,
            variant=variant,
            radius=radius,
            step=step,
            steps=steps,
            checkpoints=checkpoints,
            inner_steps=inner_steps,
            target=target,
            labels=labels,
            compat=compat,
            seed=seed,
            resident=resident,
            vectorised=vectorised,
            compiled=compiled,
        )
        super().__init__(protection, cache_dir, cache)
