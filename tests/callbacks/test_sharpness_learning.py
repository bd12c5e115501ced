"""What sharpness-aware training is for, on real digits: flatter minima, and better accuracy when labels are wrong.

The whole table (seven methods, three seeds) is configs/digits/sharpness_study.yaml.
"""

from statistics import fmean

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.helpers import digits, quiet_trainer
from torchlethe.callbacks import SharpnessAware, SharpnessEvaluation
from torchlethe.data import UniformNoise
from torchlethe.lightning_modules import Classifier
from torchlethe.models import MLP

EPOCHS, STEPS = 40, 760


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Test accuracy in percent and λ max on the training set, after the recipe of the study."""

    def train(method: str, rho: float, noise: float, seed: int) -> tuple[float, float]:
        seed_everything(seed)
        module = Classifier(
            MLP(),
            num_classes=10,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
            lr_interval="step",
        )
        evaluation = SharpnessEvaluation(
            samples=None, batch_size=1200, metrics=["hessian_top_eigenvalue"], accuracy=["test"]
        )
        climbs = [] if method == "sgd" else [SharpnessAware(method, rho, lmbda=0.6 if method == "fsam" else None)]
        trainer = quiet_trainer(
            max_epochs=EPOCHS,
            callbacks=[evaluation, *climbs],
            default_root_dir=tmp_path_factory.mktemp("run"),
        )
        data = digits(label_noise=UniformNoise(noise, seed), seed=seed, eval_batch_size=600)
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == STEPS
        found = trainer.callback_metrics
        return found["test_accuracy"].item(), found["hessian_top_eigenvalue"].item()

    return train


def test_wrong_labels_cost_fsam_less_than_sgd_and_its_minimum_is_flatter(trained):
    seeds = (0, 1)
    (sgd, sharp), (fsam, flat) = (
        map(fmean, zip(*(trained(method, 0.3, 0.4, seed) for seed in seeds), strict=True)) for method in ("sgd", "fsam")
    )
    assert fsam >= sgd + 1
    assert flat <= sharp / 2


def test_a_radius_that_is_too_large_for_sam_suits_fsam(trained):
    (sam, _), (fsam, _) = (trained(method, 0.6, 0.0, 1) for method in ("sam", "fsam"))
    assert fsam >= sam
