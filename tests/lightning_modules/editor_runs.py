"""Runs of the editors and of the methods with teachers, that tests repeat; also a script for one of two ranks.

python -m tests.lightning_modules.editor_runs FOLDER RANK PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.helpers import forgetful_digits, norm_free_network, quiet_trainer
from tests.two_ranks import one_of_two_ranks
from torchlethe.data import ForgetClasses
from torchlethe.io import save_weights
from torchlethe.lightning_modules import (
    ASSD,
    LFSSD,
    SCRUB,
    SSD,
    UNSIR,
    BadTeacher,
    BoundaryExpand,
    BoundaryShrink,
    FisherForgetting,
    InfluenceUnlearning,
)


def sgd(lr: float) -> Any:
    """SGD with momentum."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


MODULES: dict[str, Any] = {
    "ssd": lambda network: SSD(network, 10, alpha=1.2),
    "ssd_per_sample": lambda network: SSD(network, 10, alpha=1.2, per_sample=True),
    "lfssd": lambda network: LFSSD(network, 10, alpha=1.1),
    "assd": lambda network: ASSD(network, 10),
    "influence": lambda network: InfluenceUnlearning(network, 10, alpha=3.0),
    "influence_cg": lambda network: InfluenceUnlearning(network, 10, inverse="cg", iterations=3),
    "influence_woodfisher": lambda network: InfluenceUnlearning(network, 10, inverse="true_woodfisher", iterations=3),
    "influence_kfac": lambda network: InfluenceUnlearning(network, 10, inverse="kfac", alpha=0.1),
    "fisher_new": lambda network: FisherForgetting(network, 10, alpha=1e-8),
    "fisher": lambda network: FisherForgetting(network, 10, variant="fisher"),
    "scrub": lambda network: SCRUB(network, 10, epochs=2, msteps=1, optimizer=sgd(5e-3), rewind=True),
    "bad_teacher": lambda network: BadTeacher(network, 10, optimizer=sgd(0.05), remain_share=0.2),
    "boundary_shrink": lambda network: BoundaryShrink(network, 10, optimizer=sgd(0.01), skip_failed=True),
    "boundary_expand": lambda network: BoundaryExpand(network, 10, optimizer=sgd(0.01)),
    "unsir": lambda network: UNSIR(
        network, 10, optimizer=sgd(0.02), repair=sgd(0.01), per_class=12, noise_batch=24, noise_steps=3
    ),
}
ALONE = ("bad_teacher", "boundary_shrink", "boundary_expand")  # these end with the Trainer's epochs


class Headed(nn.Module):
    """A network without BatchNorm and with a head."""

    def __init__(self) -> None:
        super().__init__()
        *body, self.fc = norm_free_network()
        self.body = nn.Sequential(*body)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, 10)``."""
        return self.fc(self.body(image))


def data(batch_size: int = 60) -> Any:
    """Digits without one class: 110 images to forget, 970 that remain, so that two ranks share them evenly."""
    return forgetful_digits(ForgetClasses([3]), batch_size=batch_size, validation=120, label_noise=None)


def joined(name: str, batch_size: int, folder: Path, **arguments: Any) -> LightningModule:
    """A short run of a network without BatchNorm in float64; rank 0 writes the weights."""
    module = MODULES[name](Headed().double())
    trainer = quiet_trainer(precision="64-true", max_epochs=1 if name in ALONE else None, **arguments)
    trainer.fit(module, datamodule=data(batch_size))
    if trainer.is_global_zero:
        save_weights(dict(module.network.state_dict()), folder / f"{name}.safetensors")
    return module


if __name__ == "__main__":
    with one_of_two_ranks() as ranks:
        for name in MODULES:
            joined(name, 30, Path(sys.argv[1]), **ranks())
