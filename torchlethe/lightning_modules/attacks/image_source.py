"""Looking at a run's data before its loops do: the size of the images."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from torchlethe.data import as_batch, labelled

_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


def image_shape(module: LightningModule) -> tuple[int, int, int]:
    """(C, H, W) of the images of the running stage.

    Args:
        module: attached to a Trainer whose data is set up.

    Raises:
        ValueError: it cannot be told from the data.
    """
    trainer = module.trainer
    datamodule: Any = getattr(trainer, "datamodule", None)
    fitting = trainer.state.fn == "fit"
    try:
        stored = getattr(datamodule, "train_set" if fitting else "test_set", None)
        if stored is not None and hasattr(datamodule, "prepare_batch"):
            image = datamodule.prepare_batch(stored[[0]])["image"]
        else:
            image = _first_image(_loader(trainer, datamodule))
        channels, height, width = image.shape[-3:]
    except Exception as error:  # somebody else's data may fail in any way
        raise ValueError(
            "image_shape could not be told from the data: give it, for example --model.image_shape '[3, 32, 32]'."
        ) from error
    return channels, height, width


def _loader(trainer: Trainer, datamodule: Any) -> Any:
    stage = trainer.state.fn.value if trainer.state.fn is not None else "fit"
    if datamodule is not None:
        return getattr(datamodule, f"{_LOADERS[stage]}_dataloader")()
    loop: Any = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }[stage]
    return loop._data_source.instance


def _first_image(loader: Any) -> Any:
    if isinstance(loader, dict):
        loader = list(loader.values())
    if isinstance(loader, list | tuple):
        loader = loader[0]
    if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__"):
        sample = loader.dataset[0]
        if isinstance(sample, Tensor):
            return sample
        return sample["image"] if isinstance(sample, dict) and "image" in sample else sample[0]
    return as_batch(labelled(next(iter(loader))))["image"]
