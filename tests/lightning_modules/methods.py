"""Every unlearning method as a module, and small data of which anything can be forgotten, for tests over them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from tests.helpers import quiet_trainer, sgd
from torchlethe.data import ForgetRequest, InMemoryImages
from torchlethe.datamodules import ImageDataModule, PhotoPatchesDataModule, UnlearningDataModule
from torchlethe.lightning_modules import (
    ASSD,
    CFW,
    CT,
    LFSSD,
    MSG,
    NPO,
    SCAR,
    SCRUB,
    SSD,
    UNSIR,
    BadTeacher,
    BoundaryExpand,
    BoundaryShrink,
    CFk,
    EUk,
    FineTune,
    FisherForgetting,
    GradientAscent,
    InfluenceUnlearning,
    JiT,
    L1Sparse,
    MUMis,
    NatMU,
    NegGradPlus,
    RandomLabel,
    Retrain,
    SalUn,
    SalUnSoft,
    SFRon,
    UnlearningModule,
)

Make = Callable[[nn.Module, int], UnlearningModule]


def _trained(module_class: Any, lr: float = 1e-3, **fixed: Any) -> Make:
    return lambda network, classes: module_class(network, classes, optimizer=sgd(lr), **fixed)


def _edited(module_class: Any, **fixed: Any) -> Make:
    return lambda network, classes: module_class(network, classes, **fixed)


def _scar(network: nn.Module, classes: int) -> UnlearningModule:
    """With photographs of the size that the tests have for the network's number of channels."""
    channels = next(p.shape[1] for p in network.parameters() if p.ndim == 4)
    photos = PhotoPatchesDataModule({1: 8, 3: 16}[channels], channels, count=80)
    return SCAR(network, classes, photos, optimizer=sgd(1e-3))


METHODS: dict[str, Make] = {
    "retrain": _trained(Retrain),
    "fine_tune": _trained(FineTune),
    "gradient_ascent": _trained(GradientAscent),
    "neg_grad_plus": _trained(NegGradPlus),
    "npo": _trained(NPO),
    "random_label": _trained(RandomLabel),
    "random_label_joined": _trained(RandomLabel, order="joined", labels="other", redraw="once"),
    "salun": _trained(SalUn),
    "salun_soft": _trained(SalUnSoft),
    "l1_sparse": _trained(L1Sparse),
    "cf_k": _trained(CFk),
    "eu_k": _trained(EUk),
    "msg": _trained(MSG),
    "ct": _trained(CT),
    "cfw": _trained(CFW, noise=0.1),
    "jit": _trained(JiT, draws=2),
    "sfron": _trained(SFRon, steps=4, forget_every=2),
    "mu_mis": _edited(MUMis, steps=4, min_dip=1.0),
    "natmu": _trained(NatMU),
    "scar": _scar,
    "scrub": _trained(SCRUB, epochs=1, msteps=1),
    "bad_teacher": _trained(BadTeacher),
    "boundary_shrink": _trained(BoundaryShrink),
    "boundary_expand": _trained(BoundaryExpand),
    "unsir": _trained(UNSIR, repair=sgd(1e-3), per_class=8, noise_batch=8, noise_steps=2),
    "ssd": _edited(SSD, alpha=1.2),
    "ssd_per_sample": _edited(SSD, alpha=1.2, per_sample=True),
    "lfssd": _edited(LFSSD, alpha=1.2),
    "assd": _edited(ASSD),
    "influence": _edited(InfluenceUnlearning, alpha=0.1),
    "influence_cg": _edited(InfluenceUnlearning, inverse="cg", alpha=0.1, iterations=2),
    "influence_woodfisher": _edited(InfluenceUnlearning, inverse="true_woodfisher", alpha=0.1, iterations=2),
    "influence_kfac": _edited(InfluenceUnlearning, inverse="kfac", alpha=0.01),
    "fisher_new": _edited(FisherForgetting, alpha=1e-9),
    "fisher": _edited(FisherForgetting, variant="fisher", alpha=1e-12),
}

MAY_STAY = ("ssd", "ssd_per_sample", "lfssd", "assd", "gradient_ascent", "mu_mis")
"""Methods that may find nothing to change in a network that was not trained."""

WHOLE_CLASSES_ONLY = ("unsir",)
"""Methods that are defined for classes and refuse any other request."""


class CoarseImages(ImageDataModule):
    """Random images in 4 classes of 3 subclasses each, which a network can tell apart by their mean."""

    num_classes = 4

    def __init__(self, channels: int = 1, size: int = 8, count: int = 240, **kwargs: Any) -> None:
        super().__init__(**({"batch_size": 60, "augmentation": None} | kwargs))
        self.shape, self.count = (channels, size, size), count

    def load(self, split: str) -> InMemoryImages:
        """As many training as test images."""
        generator = torch.Generator().manual_seed(int(split == "test"))
        fine = torch.arange(self.count) % 12
        noise = torch.randint(0, 60, (self.count, *self.shape), generator=generator)
        images = (noise + 16 * fine.view(-1, 1, 1, 1)).to(torch.uint8)
        names = [f"fine{number}" for number in range(12)]
        return InMemoryImages(images, fine // 3, classes=["a", "b", "c", "d"], subclasses=fine, subclass_names=names)


def divided(request: ForgetRequest, **kwargs: Any) -> UnlearningDataModule:
    """The random images with a forget request."""
    return UnlearningDataModule(CoarseImages(**kwargs), request)


class Plain(nn.Sequential):
    """A network without BatchNorm and dropout; the last layer is found by its name."""

    def __init__(self, classes: int = 4, outputs: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes if outputs is None else outputs)


def plain(classes: int = 4, seed: int = 0) -> nn.Module:
    """A small network from a fixed initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Plain(classes)


def unlearn(module: UnlearningModule, data: Any, **arguments: Any) -> Trainer:
    """A short fit: an epoch, or the method's own steps."""
    trainer = quiet_trainer(**({"max_epochs": 1 if module.automatic_optimization else None} | arguments))
    trainer.fit(module, datamodule=data)
    return trainer


def finite(module: nn.Module) -> bool:
    """Whether every weight and statistic is a number."""
    return all(bool(torch.isfinite(value).all()) for value in _floats(module))


def moved(module: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether any weight or statistic differs from what it was."""
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def _floats(module: nn.Module) -> list[Tensor]:
    return [value for value in module.state_dict().values() if value.is_floating_point()]
