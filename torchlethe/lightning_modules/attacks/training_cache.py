"""What the network says about the clean training images, asked once where that saves work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from torchlethe.components.clean_cache import IndexCache, fingerprint
from torchlethe.data import PositionedLoader, labelled, model_input
from torchlethe.lightning_modules.attacks.judging import JudgedPerturbation
from torchlethe.lightning_modules.loops import in_order

CACHE_LIMIT = 2 << 30  # bytes of clean outputs that "auto" keeps


def training_cache(module: JudgedPerturbation, when: Literal["auto", "always", "never"]) -> IndexCache | None:
    """Features and logits of all clean training images, by their index; None where they are asked for in each step.

    Args:
        module: at the start of a fit.
        when: ``auto`` where the datamodule does not augment and the run has several epochs, ``always`` or ``never``.

    Raises:
        ValueError: ``always``, but the batches have no index.
    """
    if when == "never" or not module.attack.clean or (when == "auto" and not _worth_it(module)):
        return None
    columns: dict[str, list[Tensor]] = {"index": [], "mark": []}
    for given in _transferred(module, in_stored_order(module.trainer)):
        batch = model_input(labelled(given))
        if "index" not in batch:
            if when == "auto":
                return None
            raise ValueError("cache_clean is 'always', but the batches have no index: set it to 'auto'.")
        clean = module.clean_outputs(batch["image"])
        found = {name: value for name, value in clean.items() if name.removeprefix("clean_") in module.attack.clean}
        for name, value in {"index": batch["index"], "mark": fingerprint(batch["image"]), **found}.items():
            columns.setdefault(name, []).append(value)
    rows = {name: torch.cat(parts) for name, parts in columns.items()}
    return IndexCache(rows.pop("index"), marks=rows.pop("mark"), outputs=rows)


def _worth_it(module: JudgedPerturbation) -> bool:
    trainer: Any = module.trainer
    datamodule = getattr(trainer, "datamodule", None)
    fixed = hasattr(datamodule, "train_set") and getattr(datamodule, "augmentation", "unknown") is None
    whole = trainer.limit_train_batches == 1.0 and not trainer.overfit_batches
    if trainer.max_epochs == 1 or trainer.fast_dev_run or not fixed or not whole:
        return False
    head = module.split.head_weight()
    width = module.num_classes + (0 if head is None else head.shape[1])
    return len(datamodule.train_set) * width * 4 <= CACHE_LIMIT  # type: ignore[union-attr]


def in_stored_order(trainer: Trainer) -> Iterable[Any]:
    """The training data once, each rank its share, without augmentation where the datamodule can do without.

    Args:
        trainer: in a fit.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    given: Any = trainer.train_dataloader
    if hasattr(datamodule, "eval_loader") and getattr(datamodule, "train_set", None) is not None:
        return datamodule.eval_loader(datamodule.train_set)
    if isinstance(given, PositionedLoader):
        # a pass of its own, that leaves the position of the training loader alone
        return PositionedLoader(given.dataset, batch_size=given.batch_size)
    return in_order(given, trainer)


def _transferred(module: JudgedPerturbation, loader: Iterable[Any]) -> Iterable[Any]:
    """Batches as the Trainer's own loops would hand them over."""
    trainer = module.trainer
    for given in loader:
        batch = trainer.precision_plugin.convert_input(given)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
