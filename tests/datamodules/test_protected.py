"""The two sides of protection as data: what is protected, and what is trained on."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule

from torchlethe.data import JPEG, Augmentation, BitDepth, ForgetClasses, SymmetricNoise
from torchlethe.datamodules import (
    DigitsDataModule,
    ProtectedDataModule,
    ProtectionDataModule,
    UnlearningDataModule,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """All digits, inverted, as an npz file that somebody else wrote."""
    data = DigitsDataModule()
    data.setup()
    path = tmp_path_factory.mktemp("source") / "inverted.npz"
    order = np.random.default_rng(0).permutation(1200)
    train = data.train_set
    np.savez(path, image=255 - train.images.numpy()[order], index=order, label=train.labels.numpy()[order])
    return path


def clean():
    data = DigitsDataModule()
    data.setup()
    return data


def ready(*args, **kwargs):
    data = ProtectedDataModule(*args, **kwargs)
    data.setup()
    return data


def test_protected_images_take_their_places(source):
    data = ready(DigitsDataModule(batch_size=50), source)
    assert torch.equal(data.train_set.images, 255 - clean().train_set.images)
    assert torch.equal(data.train_set.labels, clean().train_set.labels)
    assert torch.equal(data.test_set.images, clean().test_set.images)
    assert data.protected_mask.all()
    assert (data.batch_size, data.num_classes, data.classes[3]) == (50, 10, "3")


def test_a_share_of_the_images_and_its_clean_rest(source):
    half = ready(DigitsDataModule(), source, ratio=0.5)
    assert int(half.protected_mask.sum()) == 600
    inverted = (half.train_set.images == 255 - clean().train_set.images).flatten(1).all(1)
    assert torch.equal(inverted, half.protected_mask)
    rest = ready(DigitsDataModule(), source, ratio=0.5, part="clean")
    assert torch.equal(rest.train_set.indices, half.train_set.indices[~half.protected_mask])
    assert torch.equal(rest.train_set.images, clean().train_set.images[~half.protected_mask])
    assert not rest.protected_mask.any()
    taken = ready(DigitsDataModule(), source, ratio=0.5, part="protected")
    assert sorted([*taken.train_set.indices.tolist(), *rest.train_set.indices.tolist()]) == list(range(1200))


def test_one_class_of_them(source):
    data = ready(DigitsDataModule(), source, classes=[4], indices=list(range(600)))
    wanted = (clean().train_set.labels == 4) & (torch.arange(1200) < 600)
    assert torch.equal(data.protected_mask, wanted)


def test_protection_comes_first_then_defences_then_augmentation(source):
    data = ready(DigitsDataModule(augmentation=Augmentation(crop=1)), source, defences=[BitDepth(3), JPEG(60)])
    treated = JPEG(60).apply(BitDepth(3).apply(255 - clean().train_set.images))
    assert torch.equal(data.train_set.images, treated)
    batch = next(iter(data.train_dataloader()))
    found = data.prepare_batch(batch, augment=True)["image"]
    expected = Augmentation(crop=1)(treated[batch["index"]], batch["index"], batch["epoch"], seed=0).float() / 255
    assert torch.equal(found, expected)


def test_without_a_protected_set_it_is_the_clean_data_with_the_same_defences():
    assert torch.equal(ready(DigitsDataModule()).train_set.images, clean().train_set.images)
    data = ready(DigitsDataModule(), defences=[BitDepth(2)])
    assert torch.equal(data.train_set.images, BitDepth(2).apply(clean().train_set.images))


def test_settings_of_the_wrapped_module_count(source):
    data = ready(DigitsDataModule(validation=100, label_noise=SymmetricNoise(0.1), seed=3), source)
    assert len(data.train_set) == 1100
    assert len(data.validation_set) == 100
    assert (data.train_set.labels != data.train_set.clean_labels).any()
    rows = data.train_set.indices
    assert torch.equal(data.train_set.images, 255 - clean().train_set.images[rows])


def test_it_can_be_unlearned_from(source):
    data = UnlearningDataModule(ProtectedDataModule(DigitsDataModule(), source), ForgetClasses([3]))
    data.setup()
    assert torch.equal(
        data.role_set("forget").images, 255 - clean().train_set.subset(clean().train_set.labels == 3).images
    )


def test_images_to_protect_are_bytes_in_stored_order():
    data = ProtectionDataModule(DigitsDataModule(augmentation=Augmentation(crop=2)), classes=[1, 2], batch_size=64)
    data.setup()
    batches = list(data.predict_dataloader())
    wanted = clean().train_set.subset(torch.isin(clean().train_set.labels, torch.tensor([1, 2])))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), wanted.images)
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), wanted.indices)
    assert len(data.train_set) == 1200
    assert max(len(batch["image"]) for batch in batches) == 64


def clean_indices(data):
    data.setup()
    return data.train_set.indices.tolist()


def test_refusals(source, tmp_path):
    with pytest.raises(ValueError, match="data is a LightningDataModule"):
        ProtectionDataModule(LightningDataModule())
    with pytest.raises(ValueError, match=r"ratio is 0, it must lie in \(0, 1\]"):
        ProtectedDataModule(DigitsDataModule(), source, ratio=0)
    with pytest.raises(ValueError, match="part is 'half'"):
        ProtectedDataModule(DigitsDataModule(), source, part="half")
    with pytest.raises(ValueError, match="no training image is left"):
        ready(DigitsDataModule(), source, part="clean")
    with pytest.raises(ValueError, match="classes contains 12, but no training image has it"):
        ProtectionDataModule(DigitsDataModule(), classes=[0, 12]).setup()
    with pytest.raises(ValueError, match="indices contains 1200, but no training image has it"):
        ProtectionDataModule(DigitsDataModule(), indices=[3, 1200]).setup()
    held_out = sorted(set(range(1200)) - set(clean_indices(DigitsDataModule(validation=0.1))))
    with pytest.raises(ValueError, match=r"select none of the \d+ training images"):
        ProtectionDataModule(DigitsDataModule(validation=0.1), indices=held_out[:1]).setup()
    with pytest.raises(ValueError, match=r"has images \(1, 8, 8\), but the training set has \(1, 32, 32\)"):
        ready(DigitsDataModule(image_size=32), source)
