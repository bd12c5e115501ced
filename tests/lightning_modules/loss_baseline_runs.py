"""Runs of the loss-type baselines that the resume and rank tests repeat; also a script for one of two ranks.

python -m tests.lightning_modules.loss_baseline_runs FOLDER RANK PORT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tests.helpers import cosine, forgetful_digits, norm_free_network, quiet_trainer, sgd
from tests.two_ranks import one_of_two_ranks
from torchlethe.io import save_weights
from torchlethe.lightning_modules import (
    CFW,
    CT,
    MSG,
    NPO,
    CFk,
    EUk,
    GradientAscent,
    JiT,
    L1Sparse,
    NegGradPlus,
    RandomLabel,
    SalUn,
    SalUnSoft,
    UnlearningModule,
)

Make = Callable[..., UnlearningModule]


def _module(module_class: Any, **fixed: Any) -> Make:
    def make(network: nn.Module, **changed: Any) -> UnlearningModule:
        return module_class(network, 10, **({"optimizer": sgd(0.01)} | fixed | changed))

    return make


KINDS: dict[str, Make] = {
    "gradient_ascent": _module(GradientAscent),
    "neg_grad_plus": _module(NegGradPlus),
    "npo": _module(NPO, lr_scheduler=cosine(2)),
    "random_label": _module(RandomLabel),
    "random_label_joined": _module(RandomLabel, order="joined", labels="other", redraw="once"),
    "salun": _module(SalUn),
    "salun_soft": _module(SalUnSoft),
    "l1_sparse": _module(L1Sparse),
    "cf_k": _module(CFk),
    "eu_k": _module(EUk),
    "msg": _module(MSG),
    "ct": _module(CT),
    "cfw": _module(CFW, noise=0.1),
    "jit": _module(JiT, draws=2, bn_mode="train"),
}

RANKS = ("npo", "random_label_joined", "salun", "cf_k", "msg", "jit")
"""One of each way in which ranks could differ: a paired feed, labels, a measured mask, frozen or new weights, noise."""


def joined(kind: str, batch_size: int, folder: Path, **arguments: Any) -> None:
    """A short run in float64 of a network without BatchNorm; writes the weights."""
    named = {"blocks": ["3", "5"]} if kind in ("cf_k", "eu_k") else {}
    module = KINDS[kind](norm_free_network().double(), **named)
    trainer = quiet_trainer(precision="64-true", max_epochs=1, limit_train_batches=6, **arguments)
    trainer.fit(module, datamodule=forgetful_digits(batch_size=batch_size, test_size=597))
    if trainer.is_global_zero:
        save_weights(module.network, folder / f"{kind}.safetensors")


if __name__ == "__main__":
    with one_of_two_ranks() as ranks:
        for kind in RANKS:
            joined(kind, 30, Path(sys.argv[1]), **ranks())
