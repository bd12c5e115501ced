"""Relearning time inside a running Trainer: the forget samples of all ranks, and fine-tuning of a copy on rank 0."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from torchlethe.callbacks.evaluation_passes import batch_count, check_complete, evaluation_sets
from torchlethe.callbacks.evaluation_summary import forget_level
from torchlethe.components import eval_mode
from torchlethe.data import PADDING_LABEL
from torchlethe.functional.relearning import anamnesis_index, relearning_target
from torchlethe.io import load_weights
from torchlethe.metrics.comparison import Answers
from torchlethe.metrics.passes import gather_rows, own_batches
from torchlethe.metrics.relearning import Relearning, RelearningSettings, choose_samples, relearn
from torchlethe.metrics.roles import distinct_rows


def check_relearning(trainer: Trainer, pl_module: LightningModule, attribute: str) -> None:
    """Check that a copy of the network can be fine-tuned.

    Args:
        trainer: the running Trainer.
        pl_module: the module of which a part is to be copied.
        attribute: the name of that part.

    Raises:
        ValueError: the module has no such part, or its network is sharded.
    """
    if not isinstance(getattr(pl_module, attribute, None), nn.Module):
        raise ValueError(f"relearning needs a module with a '{attribute}' of which it can fine-tune a copy.")
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError("relearning cannot fine-tune a copy of a sharded network, evaluate it with DDP.")


def collect_samples(
    trainer: Trainer,
    pl_module: LightningModule,
    loaders: Mapping[str, Any] | None,
    index: Tensor,
    settings: RelearningSettings,
) -> tuple[Tensor, Tensor]:
    """The forget samples that take part, as the evaluation sees them.

    Args:
        trainer: the running Trainer.
        pl_module: says on which device batches are prepared.
        loaders: as for :func:`~torchlethe.callbacks.evaluation_passes.collect_outputs`.
        index: (N,) indices of the whole forget set in the order of its outputs; on rank 0.
        settings: which samples to choose.

    Returns:
        Images (M, …) and labels (M,) int64 on the CPU, ordered by index; under DDP complete on rank 0, empty elsewhere.
    """
    wanted: Tensor = trainer.strategy.broadcast(index[choose_samples(len(index), settings)], src=0)
    rank, world = trainer.global_rank, trainer.world_size
    limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with isolate_rng(), torch.no_grad():
        sets, prepare = evaluation_sets(trainer, loaders)
        check_complete(sets)
        for raw, positions, repeated in own_batches(sets["forget"], rank, world, count=batch_count, limit=limit):
            batch = prepare(raw, pl_module.device)
            label, found = batch["label"].cpu(), batch.get("index", positions).cpu()
            keep = torch.isin(found, wanted) & (label != PADDING_LABEL) & (found >= 0) & (not repeated)
            parts.append((batch["image"].cpu()[keep], label[keep], found[keep]))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if world == 1:
        rows = columns[2].argsort(stable=True)
    else:
        keep_here, device = trainer.is_global_zero, trainer.strategy.root_device
        gather = trainer.strategy.all_gather
        columns = [gather_rows(c, gather, keep=keep_here, device=device, chunk=256) for c in columns]
        rows = distinct_rows(columns[2])
    return columns[0][rows], columns[1][rows]


def relearning_time(
    pl_module: LightningModule,
    samples: tuple[Tensor, Tensor],
    target: float,
    settings: RelearningSettings,
    *,
    weights: Path | None = None,
    attribute: str = "network",
) -> Relearning:
    """Fine-tune a copy of a module's network in eval mode and full precision; nothing of the module changes.

    All of the copy's parameters take part, also those that the method had frozen. float16 and bfloat16 weights are
    copied as float32, in which small steps are not lost.

    Args:
        pl_module: its ``forward(image)`` gives logits by way of its network.
        samples: of :func:`collect_samples`; on this rank.
        target: the level to reach.
        settings: the procedure.
        weights: file to load into the copy; the module's own weights without one.
        attribute: the name of the network in the module.

    Returns:
        Of :func:`~torchlethe.metrics.relearning.relearn`.
    """
    own: nn.Module = getattr(pl_module, attribute)
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad(), eval_mode(pl_module):
        # what a test collects in inference mode takes no part in autograd
        images, labels = (values.clone() for values in samples)
        network = copy.deepcopy(own)
        if weights is not None:
            network = load_weights(network, weights)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
            network = network.float()
        network = network.eval().requires_grad_(True)
        parameters = list(network.parameters())
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), images.dtype)
        setattr(pl_module, attribute, network)
        try:
            return relearn(pl_module, parameters, images.to(dtype), labels, target, settings, device=pl_module.device)
        finally:
            setattr(pl_module, attribute, own)


def measure_relearning(
    pl_module: LightningModule,
    samples: tuple[Tensor, Tensor],
    settings: RelearningSettings,
    answers: Mapping[str, Answers | None],
    labels: Tensor,
    *,
    reference: Path | None,
    known: Callable[[float], tuple[int, bool] | None],
    attribute: str = "network",
) -> tuple[dict[str, float], dict[str, Any]]:
    """The relearning times of a module and of its reference.

    Args:
        pl_module: the judged module.
        samples: of :func:`collect_samples`.
        settings: the procedure.
        answers: of the models on the whole forget set: the module (named ``""``) and the ``original``.
        labels: (N,) of the forget set.
        reference: the reference's weights.
        known: what the reference's own run measured, given the level to reach.
        attribute: the name of the network in the module.

    Returns:
        ``relearning_steps``, with a reference also ``reference_relearning_steps`` and ``relearning_ratio`` (NaN where
        one of both was stopped before it was back, or Retrain needs no step); and what else is worth recording. Both
        are empty without the original's answers, and for an original that knows much less than the module: that is a
        run which started from random weights.
    """
    own, original = answers.get(""), answers.get("original")
    if own is None or original is None:
        rank_zero_warn("Relearning was not measured: the original's answers are unknown, give original.")
        return {}, {}
    everything = torch.arange(len(labels))
    if forget_level(original, labels, everything) < 0.5 * forget_level(own, labels, everything):
        rank_zero_warn(
            "Relearning was not measured: the weights at fit start know far less of the forget set than those at its "
            "end, so they are not the original; give original."
        )
        return {}, {}
    rows = choose_samples(len(labels), settings)
    target = relearning_target(
        forget_level(original, labels, rows, settings.criterion), settings.margin, settings.criterion
    )
    found = relearning_time(pl_module, samples, target, settings, attribute=attribute)
    metrics = {"relearning_steps": float(found.steps)}
    record: dict[str, Any] = {
        "settings": asdict(settings),
        "target": target,
        "reached": found.reached,
        "curve": list(found.curve),
    }
    if reference is not None:
        theirs = known(target)
        if theirs is None:
            again = relearning_time(pl_module, samples, target, settings, weights=reference, attribute=attribute)
            theirs = again.steps, again.reached
        metrics["reference_relearning_steps"] = float(theirs[0])
        record["reference_reached"] = theirs[1]
        both = found.reached and theirs[1]
        metrics["relearning_ratio"] = anamnesis_index(found.steps, theirs[0]) if both else math.nan
    return metrics, record
