"""Small pieces that many tests use: a quiet trainer, quick data, comparisons of states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torchlethe.data import ForgetFraction, ForgetRequest, SymmetricNoise
from torchlethe.datamodules import DigitsDataModule, UnlearningDataModule


def quiet_trainer(**kwargs: Any) -> Trainer:
    """A CPU trainer that writes nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | kwargs))


def digits(**kwargs: Any) -> DigitsDataModule:
    """Digits with 15 % label noise in batches of 64, so that memorisation is visible."""
    defaults: dict[str, Any] = {"batch_size": 64, "label_noise": SymmetricNoise(0.15), "augmentation": None}
    return DigitsDataModule(**(defaults | kwargs))


def forgetful_digits(forget: ForgetRequest | None = None, **kwargs: Any) -> UnlearningDataModule:
    """Digits of which a random tenth is to be forgotten."""
    return UnlearningDataModule(digits(**kwargs), forget or ForgetFraction(0.1))


def sgd(lr: float = 0.05) -> Any:
    """The optimizer of the digits recipe."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def cosine(epochs: int) -> Any:
    """Cosine decay over whole epochs."""
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)


def small_network(seed: int = 0) -> nn.Module:
    """The digits CNN from a fixed initialisation."""
    from torchlethe.models import SmallCNN

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallCNN(in_channels=1, image_size=8, num_classes=10)


def norm_free_network(seed: int = 0) -> nn.Module:
    """A small network without BatchNorm, for comparisons across ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.GELU(),
            nn.Linear(32, 10),
        )


def assert_same_bits(first: Mapping[str, Tensor] | nn.Module, second: Mapping[str, Tensor] | nn.Module) -> None:
    """Every tensor is equal, bit for bit."""
    a = first.state_dict() if isinstance(first, nn.Module) else first
    b = second.state_dict() if isinstance(second, nn.Module) else second
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def accuracy(module: LightningModule | nn.Module, loader: Iterable[Any], prepare: Any) -> float:
    """Accuracy in percent over a loader."""
    was_training = module.training
    module.eval()
    right = count = 0
    with torch.no_grad():
        for raw in loader:
            batch = prepare(raw)
            kept = batch["label"] >= 0
            right += int(((module(batch["image"]).argmax(1) == batch["label"]) & kept).sum())
            count += int(kept.sum())
    module.train(was_training)
    return 100 * right / count
