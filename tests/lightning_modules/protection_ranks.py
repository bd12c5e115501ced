"""Protecting runs of the rank test; also a script, since ranks are processes.

python -m tests.lightning_modules.protection_ranks FOLDER RANK PORT     one of two ranks of every kind of run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers import quiet_trainer
from tests.two_ranks import one_of_two_ranks
from torchlethe.callbacks import ProtectedWriter
from torchlethe.components.checkpoint_folder import Checkpoint, write_list
from torchlethe.datamodules import DigitsDataModule, ProtectionDataModule
from torchlethe.io import file_hash, save_weights
from torchlethe.lightning_modules import ErrorMinimizing, OnePixelShortcut, ProtectionModule, SelfEnsembleProtection
from torchlethe.models import SmallCNN


def network(seed: int = 0) -> SmallCNN:
    """A small network with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(pooled=True)


def write_ensemble(folder: Path) -> Path:
    """Two checkpoints as a callback would write them."""
    folder.mkdir(parents=True)
    paths = [save_weights(network(seed), folder / f"epoch-{seed:04d}.safetensors") for seed in range(2)]
    write_list(folder, [Checkpoint(path.name, k, k, file_hash(path)) for k, path in enumerate(paths)], complete=True)
    return folder


def modules(ensemble: Path) -> dict[str, ProtectionModule]:
    """Preparations that are summed over ranks, in floats and in whole numbers, and one that each rank repeats."""
    return {
        "sep_fa": SelfEnsembleProtection(network(), 10, ensemble, "sep_fa", radius=16, step=4, steps=3, checkpoints=2),
        "ops": OnePixelShortcut(10),
        "em": ErrorMinimizing(
            network(), 10, radius=32, step=8.0, steps=2, train_steps=3, rounds=1, stop_error=1.1, seed=3
        ),
    }


def protect(folder: Path, ensemble: Path, ranks: Callable[[], dict[str, Any]] = dict) -> None:
    """Protect 101 digits in each way, and write the reports; ``ranks`` makes the Trainer's arguments anew each time."""
    reports = {}
    for name, module in modules(ensemble).items():
        data = ProtectionDataModule(DigitsDataModule(eval_batch_size=90), batch_size=20, indices=list(range(101)))
        trainer = quiet_trainer(
            precision="64-true",
            callbacks=[ProtectedWriter(formats=["npz"], preview=0)],
            default_root_dir=folder / name,
            **ranks(),
        )
        trainer.predict(module, datamodule=data, return_predictions=False)
        reports[name] = module.report
    if trainer.is_global_zero:
        (folder / "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with one_of_two_ranks() as ranks:
        protect(target, target.parent / "ensemble", ranks)
