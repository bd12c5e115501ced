"""NatMU: natural machine unlearning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from torchlethe.data import HybridDataset, PositionedLoader
from torchlethe.functional.hybrids import MaskKind
from torchlethe.lightning_modules.unlearning.base import TransferredBatches, UnlearningModule
from torchlethe.updates import NatMUUpdate
from torchlethe.updates.natmu import natmu_optimizer


class NatMU(UnlearningModule):
    """Towards natural machine unlearning (He et al., TPAMI 2025).

    Each forget image is mixed with remaining images of the classes that the network takes it for next, and gets their
    labels; fine-tuning on the remaining data and these hybrids teaches the network to go by the evidence that was mixed
    in. No teacher, no ascent, no mask over weights. The defaults are the official ones for CIFAR-10, VGG-16 and random
    samples (https://github.com/ZhengbaoHe/NatMU), for 5 epochs. When too little is forgotten, raise ``delta`` first.

    Args:
        network: the trained classifier, maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: number of classes.
        weights: file with the original model's weights.
        optimizer: makes the optimizer from all parameters.
        delta: offset of the masks, in [-1, 1]: larger leaves more of the forget image under the new label and forgets
            more; 1 is plain relabelling.
        n_hybrids: hybrids of each forget image, with its n most probable wrong classes; the four masks take turns.
        mask: ``tent``, as published; ``linear``, ``constant`` or ``cutmix`` for comparison.
        classes: ``top``, the image's own most probable wrong classes; ``confusion``, those of its class on average;
            ``random``.
        pairing: ``deal`` draws partners without replacement and shuffles a class anew when it runs out; ``reject`` is
            the official way to the same distribution, slow and refused where it would not end; ``walk`` is the
            published variant for hard samples, in which images go on to their next classes once a class is used up.
        redistribute: the official guard of sample-wise unlearning: demand beyond 98 % of the average supply goes to a
            class in low demand (which may be the forget image's own).
        resample: draw new partners each epoch; published is once.
        init_linear: draw the weights of the ``head``, or of ``all`` linear layers as the official flag does, anew
            before training. The official code does so for whole classes.
        lr_schedule: ``cosine`` as published (the last step has rate 0), ``cosine_from_full`` (one step earlier, so the
            first step has the full rate), or ``constant``.
        augment_remain: augment remaining images as the datamodule does; hybrids never are.
        remain_fraction: share of the remaining images that an epoch reads, in (0, 1]; another part each epoch.
        seed: seed of what the method draws, apart from the order of the data.
        collapse_guard: stop, with a warning, after an epoch in which the accuracy on remaining images, as they are
            trained on, was more than so many points below the original network's in eval mode; None never stops.
            Augmentation alone costs a few points, so give it room (20 to 30).

    Raises:
        ValueError: an argument is out of range, or the data cannot be mixed.

    Note:
        Automatic optimization: accumulation, clipping and precision are flags of the Trainer, which also sets the
        length of the schedule (``max_epochs`` or ``max_steps``). Under DDP all ranks draw the same pairs, and with
        batches of half the size two ranks compute what one process computes (networks without BatchNorm; sizes
        divisible by the number of ranks). A checkpoint holds the pairs, so that a resumed run goes on with the same
        hybrids.

    Example:
        >>> from torchlethe.models import MLP
        >>> module = NatMU(MLP(), num_classes=10, delta=-0.1)
        >>> sorted(module.reads)
        ['forget', 'remain']
    """

    update: NatMUUpdate

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = natmu_optimizer,
        delta: float = -0.19,
        n_hybrids: int = 4,
        mask: MaskKind = "tent",
        classes: Literal["top", "confusion", "random"] = "top",
        pairing: Literal["deal", "reject", "walk"] = "deal",
        redistribute: bool = False,
        resample: bool = False,
        init_linear: Literal["none", "head", "all"] = "none",
        lr_schedule: Literal["cosine", "cosine_from_full", "constant"] = "cosine",
        augment_remain: bool = True,
        remain_fraction: float = 1.0,
        seed: int = 0,
        collapse_guard: float | None = None,
    ) -> None:
        update = NatMUUpdate(
            optimizer=optimizer,
            delta=delta,
            n_hybrids=n_hybrids,
            mask=mask,
            classes=classes,
            pairing=pairing,
            redistribute=redistribute,
            resample=resample,
            init_linear=init_linear,
            lr_schedule=lr_schedule,
            augment_remain=augment_remain,
            remain_fraction=remain_fraction,
            seed=seed,
            collapse_guard=collapse_guard,
        )
        super().__init__(network, num_classes, update, weights)

    def setup(self, stage: str) -> None:
        """Check network, data and that the run has an end."""
        super().setup(stage)
        endless = self.trainer.max_epochs in (None, -1) and self.trainer.max_steps == -1
        if stage == "fit" and endless and self.update.lr_schedule != "constant":
            raise ValueError(
                f"lr_schedule is '{self.update.lr_schedule}', but the Trainer's max_epochs and max_steps set no end: "
                "set one, or lr_schedule to 'constant'."
            )

    def _preparation_batches(self) -> dict[str, Iterable[Any]]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "role_loader"):
            return super()._preparation_batches()
        given: Any = self.trainer.train_dataloader
        union = getattr(given, "dataset", None)
        if not isinstance(union, HybridDataset):
            raise ValueError(
                "NatMU mixes the images of two data sets: pass an UnlearningDataModule, or the loader that "
                "module.feed.loader(role_set, batch_size) makes of them."
            )
        ranks = self.trainer.distributed_sampler_kwargs or {}
        sets = {"forget": union.forget, "remain": union.remain}
        return {
            role: TransferredBatches(PositionedLoader(part, batch_size=given.batch_size, **ranks), role, self.trainer)
            for role, part in sets.items()
        }
