"""Lightning datamodules: one base does the work, each is a few lines; and one that divides any for unlearning."""

from torchlethe.datamodules.base import ImageDataModule
from torchlethe.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule
from torchlethe.datamodules.digits import DigitsDataModule
from torchlethe.datamodules.folders import ImageFolderDataModule, TinyImageNetDataModule
from torchlethe.datamodules.huggingface import HuggingFaceDataModule
from torchlethe.datamodules.photos import PhotoPatchesDataModule
from torchlethe.datamodules.protected import ProtectedDataModule, ProtectionDataModule
from torchlethe.datamodules.proxy_images import ProxyImages
from torchlethe.datamodules.unlearning import UnlearningDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "PhotoPatchesDataModule",
    "ProtectedDataModule",
    "ProtectionDataModule",
    "ProxyImages",
    "SVHNDataModule",
    "TinyImageNetDataModule",
    "UnlearningDataModule",
]
