"""Training images without content, for attacks that are to do without data."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.data.hashing import generator_for
from torchlethe.data.images import InMemoryImages
from torchlethe.data.loaders import PositionedLoader
from torchlethe.datamodules.base import ImageDataModule, loader_settings
from torchlethe.functional.universal import gaussian_images, jigsaw_images


class ProxyImages(LightningDataModule):
    """Another datamodule with its training images replaced by random ones; validation and test stay as they are.

    The images are drawn once, in the size of the real ones, so that a universal attack that learns from them has seen
    no data. Their labels are 0 and mean nothing.

    Args:
        data: the real datamodule.
        kind: ``jigsaw`` (grids of coloured squares) or ``gaussian`` (noise around grey).
        count: how many.
        seed: of the images and of their order.

    Attributes:
        train_set: the random images, after :meth:`setup`.
        test_set: those of ``data``.
        augmentation: None: the images do not change from epoch to epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    augmentation = None

    def __init__(
        self, data: ImageDataModule, kind: Literal["jigsaw", "gaussian"] = "jigsaw", count: int = 2000, seed: int = 0
    ) -> None:
        super().__init__()
        check_choice(("jigsaw", "gaussian"), kind=kind)
        check_at_least(1, count=count)
        self.data, self.kind, self.count, self.seed = data, kind, count, seed
        self.train_set: InMemoryImages | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes of the real images; some datamodules know it after ``setup`` only."""
        return self.data.num_classes

    @property
    def test_set(self) -> Any:
        """The real test images."""
        return self.data.test_set

    def setup(self, stage: str | None = None) -> None:
        """Load the real data for validation and test, and draw the others."""
        self.data.trainer = self.trainer
        self.data.setup(stage or "fit")
        if self.train_set is not None:
            return
        draw = jigsaw_images if self.kind == "jigsaw" else gaussian_images
        assert self.data.test_set is not None
        shape = self.data.prepare_batch(self.data.test_set[[0]])["image"].shape[1:]
        images = draw(self.count, shape, generator_for("proxy images", self.seed))
        pixels = (images * 255).round().to(torch.uint8)
        self.train_set = InMemoryImages(pixels, torch.zeros(self.count, dtype=torch.int64), classes=self.data.classes)

    def train_dataloader(self) -> PositionedLoader:
        """The random images, in an order of its own each epoch."""
        if self.train_set is None:
            raise RuntimeError("data is loaded by `setup()`, which was not called yet.")
        data = self.data
        return PositionedLoader(
            self.train_set,
            batch_size=data.batch_size,
            shuffle=True,
            seed=self.seed,
            drop_last=data.drop_last,
            **loader_settings(self, 0),
        )

    def eval_loader(self, dataset: Any) -> PositionedLoader:
        """A loader in stored order."""
        return self.data.eval_loader(dataset)

    def val_dataloader(self) -> Any:
        """The real validation images."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """The real test images."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The real test images."""
        return self.data.predict_dataloader()

    def prepare_batch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the real datamodule does outside of Lightning's loops."""
        return self.data.prepare_batch(*args, **kwargs)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        """Bring images to [0, 1], without augmentation."""
        batch = {name: value for name, value in batch.items() if name != "epoch"}
        return self.data.on_after_batch_transfer(batch, dataloader_idx)
