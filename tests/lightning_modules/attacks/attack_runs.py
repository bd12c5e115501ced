"""What the attack tests share: trained digits networks, quick runs; as a script, one of two ranks: FOLDER RANK PORT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers import norm_free_network, quiet_trainer, small_network
from tests.two_ranks import one_of_two_ranks
from torchlethe.datamodules import DigitsDataModule
from torchlethe.io import save_weights
from torchlethe.lightning_modules import NAGUAP, FeatureGatheringUAP


def digits(**kwargs: Any) -> DigitsDataModule:
    """Digits without label noise, 200 of them to select on."""
    return DigitsDataModule(**({"batch_size": 100, "eval_batch_size": 600, "validation": 200} | kwargs))


@lru_cache(maxsize=2)
def _weights(norm_free: bool) -> dict[str, torch.Tensor]:
    network = (norm_free_network if norm_free else small_network)().train()
    data = digits()
    data.setup()
    batch = data.prepare_batch(data.train_set[range(1000)])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(120):
        rows = torch.randperm(1000, generator=torch.Generator().manual_seed(step))[:100]
        loss = nn.functional.cross_entropy(network(batch["image"][rows]), batch["label"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


def trained(norm_free: bool = False) -> nn.Module:
    """A digits network that has learned, in train mode as a careless user would hand it over."""
    network = (norm_free_network if norm_free else small_network)()
    network.load_state_dict(_weights(norm_free))
    return network


def fit(module: Any, epochs: int = 3, data: Any = None, **arguments: Any) -> Any:
    """A short fit; returns its trainer."""
    trainer = quiet_trainer(**({"max_epochs": epochs, "num_sanity_val_steps": 0} | arguments))
    trainer.fit(module, datamodule=data or digits())
    return trainer


def scores_of(module: Any, data: Any = None) -> dict[str, float]:
    """The scores of a test."""
    return dict(quiet_trainer().test(module, datamodule=data or digits(), verbose=False)[0])


def joined(batch_size: int, folder: Path, ranks: Callable[[], dict[str, Any]] = dict) -> None:
    """Runs of a network without BatchNorm; rank 0 writes v and the scores.

    ``ranks`` makes the Trainer's arguments, anew for each run.
    """
    found: dict[str, torch.Tensor] = {}
    for name, kind in (("fg", FeatureGatheringUAP), ("nag", NAGUAP)):
        options: dict[str, Any] = {"diversity": 0.0} if name == "nag" else {}
        module = kind(trained(norm_free=True).double(), 10, xi=0.25, **options)
        trainer = quiet_trainer(precision="64-true", max_epochs=2, num_sanity_val_steps=0, **ranks())
        data = digits(batch_size=batch_size, subset=600)
        trainer.fit(module, datamodule=data)
        scores = trainer.test(module, datamodule=data, verbose=False)[0]
        found[f"{name}.v"] = module.noise.v.detach()
        found |= {f"{name}.{key}": torch.tensor(value, dtype=torch.float64) for key, value in scores.items()}
    if trainer.is_global_zero:
        save_weights(found, folder / "attacks.safetensors")


if __name__ == "__main__":
    with one_of_two_ranks() as ranks:
        joined(50, Path(sys.argv[1]), ranks)
