"""A NatMU run for the comparison of ranks; as a script, one of two ranks: FOLDER RANK PORT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.helpers import forgetful_digits, norm_free_network, quiet_trainer
from tests.two_ranks import one_of_two_ranks
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
    with one_of_two_ranks() as ranks:
        run(30, Path(sys.argv[1]), **ranks())
