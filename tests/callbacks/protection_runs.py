"""Protecting runs of the tests; also a script, since a process has to be killed for real.

python -m tests.callbacks.protection_runs FOLDER KILL_AT     protect digits, die by SIGKILL after KILL_AT batches
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import quiet_trainer
from torchlethe.callbacks import ProtectedWriter
from torchlethe.data import random_bits
from torchlethe.datamodules import DigitsDataModule, ProtectionDataModule
from torchlethe.lightning_modules.protection.base import ProtectionModule
from torchlethe.updates.protection import Protection


class Noise(Protection):
    """Noise of at most three levels that depends on the index, and a count of the images it was asked for."""

    radius = 3

    def __init__(self, amplitude: int = 3, kill_at: int | None = None) -> None:
        super().__init__()
        self.amplitude, self.kill_at = amplitude, kill_at
        self.batches, self.seen = 0, list[int]()

    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Die when the time has come."""
        if self.kill_at is not None and self.batches == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches += 1
        self.seen += index.tolist()
        bits = random_bits(0, 0, index, image[0].numel()).view(image.shape)
        return (image.int() + bits % (2 * self.amplitude + 1) - self.amplitude).clamp(0, 255).to(torch.uint8)

    def describe(self) -> dict[str, Any]:
        """Method and settings."""
        return {"method": "Noise", "radius": self.radius, "amplitude": self.amplitude}


def protect(folder: Path, protection: Noise | None = None, batch_size: int = 200, **settings: Any) -> Noise:
    """Protect the digits into ``folder / "protected"``."""
    protection = protection or Noise()
    data = ProtectionDataModule(DigitsDataModule(), batch_size=batch_size, **settings.pop("data", {}))
    writer = ProtectedWriter(**{"formats": ["png", "npz"], **settings.pop("writer", {})})
    trainer = quiet_trainer(callbacks=[writer], default_root_dir=folder, **settings)
    trainer.predict(ProtectionModule(protection, cache=False), datamodule=data, return_predictions=False)
    return protection


def main() -> None:
    """See the module's text."""
    torch.set_num_threads(1)
    protect(Path(sys.argv[1]), Noise(kill_at=int(sys.argv[2])))


if __name__ == "__main__":
    main()
