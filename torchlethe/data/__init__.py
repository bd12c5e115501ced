"""Data without Lightning: in-memory image sets, position-aware loaders, batched augmentation, forget requests."""

from torchlethe.data.augmentation import Augmentation
from torchlethe.data.batches import PADDING_INDEX, PADDING_LABEL, as_batch, labelled, model_input, unit_range
from torchlethe.data.defences import JPEG, BitDepth, Blur, Chain, Defence, Grayscale
from torchlethe.data.erasing import ErasingAugmentation
from torchlethe.data.forget import (
    ForgetClasses,
    ForgetFraction,
    ForgetIndices,
    ForgetRequest,
    ForgetSplit,
    ForgetSubclasses,
)
from torchlethe.data.hashing import mix_seed, random_bits
from torchlethe.data.hybrids import HybridDataset, Hybrids
from torchlethe.data.images import ImageDataset, InMemoryImages
from torchlethe.data.label_noise import AsymmetricNoise, LabelNoise, SymmetricNoise, UniformNoise
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.overlap import content_hashes, shared_images
from torchlethe.data.protected import ProtectedImages, read_protected
from torchlethe.data.roles import (
    ROLES,
    Feed,
    Interleaved,
    Joined,
    JoinedDataset,
    Paired,
    Role,
    RoleDataset,
    RoleLoader,
    Sequential,
    Single,
    feed_loader,
)
from torchlethe.data.samplers import PositionedSampler, RoleSampler, epoch_order, shard
from torchlethe.data.splits import class_balanced, stratified
from torchlethe.data.streaming import ColumnImages, DecodedImages, ImageFiles, decode
from torchlethe.data.wrapped import WrappedDataset, find_labels

__all__ = [
    "JPEG",
    "PADDING_INDEX",
    "PADDING_LABEL",
    "ROLES",
    "AsymmetricNoise",
    "Augmentation",
    "BitDepth",
    "Blur",
    "Chain",
    "ColumnImages",
    "DecodedImages",
    "Defence",
    "ErasingAugmentation",
    "Feed",
    "ForgetClasses",
    "ForgetFraction",
    "ForgetIndices",
    "ForgetRequest",
    "ForgetSplit",
    "ForgetSubclasses",
    "Grayscale",
    "HybridDataset",
    "Hybrids",
    "ImageDataset",
    "ImageFiles",
    "InMemoryImages",
    "Interleaved",
    "Joined",
    "JoinedDataset",
    "LabelNoise",
    "Paired",
    "PositionedLoader",
    "PositionedSampler",
    "ProtectedImages",
    "Role",
    "RoleDataset",
    "RoleLoader",
    "RoleSampler",
    "Sequential",
    "Single",
    "SymmetricNoise",
    "UniformNoise",
    "WrappedDataset",
    "as_batch",
    "class_balanced",
    "content_hashes",
    "decode",
    "epoch_order",
    "feed_loader",
    "find_labels",
    "labelled",
    "mix_seed",
    "model_input",
    "random_bits",
    "read_protected",
    "shard",
    "shared_images",
    "stratified",
    "unit_range",
]
