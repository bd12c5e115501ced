"""Lightning datamodules: one base does the work, each is a few lines; and one that divides any for unlearning."""

from torchlethe.datamodules.base import ImageDataModule
from torchlethe.datamodules.digits import DigitsDataModule
from torchlethe.datamodules.unlearning import UnlearningDataModule

__all__ = ["DigitsDataModule", "ImageDataModule", "UnlearningDataModule"]
