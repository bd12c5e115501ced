"""What an appropriator does to images first: known results, and the same view of an image in any batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from torchlethe.data import JPEG, Augmentation, BitDepth, Blur, Chain, ErasingAugmentation, Grayscale
from torchlethe.data.erasing import plasma


def pictures(count=6, channels=3, side=16):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, channels, side // 4, side // 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").byte()


def test_grayscale_is_that_of_pil():
    images = pictures()
    grey = Grayscale().apply(images)
    for image, found in zip(images, grey, strict=True):
        expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
        assert np.abs(found.numpy().astype(int) - expected).max() <= 1
    assert torch.equal(Grayscale().apply(images[:, :1]), images[:, :1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 90])
def test_jpeg_is_a_real_codec(channels, quality):
    images = pictures(channels=channels)
    found = JPEG(quality).apply(images)
    assert found.shape == images.shape
    assert found.dtype is torch.uint8
    for image, coded in zip(images, found, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "JPEG", quality=quality)
        expected = np.asarray(Image.open(buffer)).reshape(image.permute(1, 2, 0).shape)
        np.testing.assert_array_equal(coded.permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(found, images)


def test_bits_and_blur():
    images = pictures()
    assert len(BitDepth(2).apply(images).unique()) <= 4
    assert torch.equal(BitDepth(8).apply(images), images)
    assert torch.equal(Blur(3, 0.1).apply(images), images)  # so narrow a kernel changes nothing
    assert Blur(3, 2.0).apply(images).float().std() < images.float().std()


def test_a_chain_is_its_steps_and_leaves_out_what_is_not_to_be_augmented():
    images, index = pictures(), torch.arange(6) + 40
    chain = Chain([BitDepth(3), Augmentation(crop=2)])
    whole = chain(images, index, 3, seed=5)
    assert torch.equal(chain(images[2:4], index[2:4], 3, seed=5), whole[2:4])
    on = torch.tensor([True, False] * 3)
    assert torch.equal(chain(images, index, 3, on, seed=5)[~on], images[~on])
    assert not torch.equal(chain(images, index, 4, seed=5), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitDepth(0), "bits is 0"),
        (lambda: Blur(2), "kernel_size is 2"),
        (lambda: Blur(3, 0), "sigma is 0"),
        (lambda: JPEG(100), "quality is 100"),
        (lambda: Chain([]), "steps is empty"),
        (lambda: ErasingAugmentation(roughness=(0.0, 0.5)), "roughness is"),
        (lambda: ErasingAugmentation(intensity=(0.5, 0.1)), "intensity is"),
        (lambda: ErasingAugmentation(probability=2), "probability is 2"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_plasma_gets_rougher_and_fills_the_range():
    index = torch.arange(64)
    smooth, rough = (plasma(0, 0, index, (32, 24), torch.full((64,), r)) for r in (0.2, 0.8))
    assert smooth.shape == (64, 1, 32, 24)
    for field in (smooth, rough):
        assert torch.equal(field.amin((1, 2, 3)), torch.zeros(64))
        assert torch.equal(field.amax((1, 2, 3)), torch.ones(64))
    steps = [field.diff(dim=-1).abs().mean() for field in (smooth, rough)]
    assert steps[1] > 2 * steps[0]


@pytest.mark.parametrize("trivial", [False, True])
def test_views_depend_on_seed_epoch_and_index_alone(trivial):
    images, index = pictures().float() / 255, torch.arange(6)
    augment = ErasingAugmentation(trivial=trivial)
    before = torch.get_rng_state()
    whole = augment(images, index, 1, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat([augment(images[:2], index[:2], 1, 7), augment(images[2:], index[2:], 1, 7)]), whole)
    assert not torch.equal(augment(images, index, 2, 7), whole)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1


def test_probability_zero_changes_nothing():
    images = pictures().float() / 255
    assert torch.equal(ErasingAugmentation(probability=0, trivial=False)(images, torch.arange(6), 0, 0), images)
