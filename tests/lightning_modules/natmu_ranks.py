"""A NatMU run for the comparison of ranks; as a script, one of two ranks: FOLDER RANK PORT."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers import forgetful_digits, leave_process_group, norm_free_network, quiet_trainer
from torchlethe.io import save_weights
from torchlethe.lightning_modules import NatMU


def run(batch_size: int, folder: Path, **arguments: Any) -> None:
    """A few steps of a network without BatchNorm; rank 0 writes weights and pairs."""
    module = NatMU(norm_free_network().double(), 10, delta=0.0, init_linear="all", resample=True)
    trainer = quiet_trainer(precision="64-true", max_steps=30, **arguments)
    trainer.fit(module, datamodule=forgetful_digits(batch_size=batch_size, test_size=597))
    if trainer.is_global_zero:
        pairs = {"demand": module.update.feed.demand, "partners": module.update.feed.partners}
        save_weights(dict(module.network.state_dict()) | pairs, folder / "natmu.safetensors")


if __name__ == "__main__":
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3], "LOCAL_RANK": sys.argv[2], "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2"}
    ddp = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    run(30, Path(sys.argv[1]), devices=2, strategy=ddp)
    leave_process_group()
