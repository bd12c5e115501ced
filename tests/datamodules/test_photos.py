"""Patches of photographs: the size that was asked for, always the same, training apart from test."""

import pytest
import torch

from torchlethe.datamodules import PhotoPatchesDataModule


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (192, 3)])
def test_patches_have_the_size_and_are_reproducible(size, channels):
    first, second = (PhotoPatchesDataModule(size, channels, count=42) for _ in range(2))
    for data in (first, second):
        data.setup()
    assert first.train_set.images.shape == (42, channels, size, size)
    assert torch.equal(first.train_set.images, second.train_set.images)
    assert first.train_set.labels.bincount().tolist() == [21, 21]
    assert len(first.test_set) == 12
    assert len(first.train_set.images.flatten(1).unique(dim=0)) > 30
    assert first.train_set.images.float().std() > 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": 193}, r"image_size is 193, it must lie in \[1, 192\]"),
        ({"channels": 2}, "channels is 2"),
        ({"count": 7}, "count is 7, but must be an even number"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PhotoPatchesDataModule(**arguments)
