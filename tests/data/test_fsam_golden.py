"""Label noise and Cutout agree with nblt/F-SAM."""

import numpy as np
import pytest
import torch

from torchlethe.data import AsymmetricNoise, Augmentation, UniformNoise

OFFICIAL_PAIRS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
LABELS = (7 * torch.arange(50000) + torch.arange(50000) // 3) % 10


@pytest.fixture(scope="module")
def arrays(golden_dir):
    with np.load(golden_dir / "fsam.npz") as found:
        return {name: torch.as_tensor(found[name]) for name in found.files}


def test_uniform_noise(arrays):
    noisy = UniformNoise(float(arrays["noise_r"]), int(arrays["noise_seed"]))(LABELS, 10)
    assert torch.equal(noisy[:256], arrays["noise_first"])
    assert int((noisy != LABELS).sum()) == int(arrays["noise_changed"])
    assert int((noisy * (torch.arange(50000) % 9973)).sum()) == int(arrays["noise_weighted_sum"])


def test_asymmetric_noise(arrays):
    noise = AsymmetricNoise(float(arrays["noise_r"]), OFFICIAL_PAIRS, int(arrays["noise_seed"]), draw="fsam")
    noisy = noise(LABELS, 10)
    assert torch.equal(noisy[:256], arrays["noise_asym_first"])
    assert int((noisy != LABELS).sum()) == int(arrays["noise_asym_changed"])


def test_cutout_hides_the_official_squares(arrays):
    """The official draws in place of the hash: a coin, then the start of the rows and of the columns in -8 … 23."""
    bits = torch.zeros(len(arrays["cut_seed"]), 7, dtype=torch.int64)
    for bit, seed in zip(bits, arrays["cut_seed"].tolist(), strict=True):
        torch.manual_seed(seed)
        coin = torch.rand([1], dtype=torch.float64)  # the arrays were made with this default dtype
        bit[6] = 0 if coin <= 0.5 else 2**32 - 1
        if coin <= 0.5:
            bit[4], bit[5] = (torch.randint(-8, 24, [1]) + 8 for _ in range(2))
    augment = Augmentation(crop=0, flip=False, cutout=16, cutout_probability=0.5)
    images = torch.ones(len(bits), 1, 32, 32, dtype=torch.uint8)
    kept = augment._cut_out(images, bits, torch.ones(len(bits), dtype=torch.bool))
    assert torch.equal(kept[:, 0], arrays["cut_keep"])


def test_cutout_can_spare_images_and_fill_with_the_mean():
    images = torch.full((4000, 3, 8, 8), 200, dtype=torch.uint8)
    augment = Augmentation(crop=0, flip=False, cutout=4, cutout_probability=0.5, cutout_value=[0.5, 0.25, 0.0])
    out = augment(images, torch.arange(4000), 0)
    hit = (out != 200).any(dim=1)
    assert 1900 < int(hit.flatten(1).any(1).sum()) < 2100
    assert out.permute(0, 2, 3, 1)[hit].unique(dim=0).tolist() == [[128, 64, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(cutout_probability=2), r"cutout_probability is 2, it must lie in \[0, 1\]"),
        (lambda: Augmentation(cutout_value=[0.5, 255]), r"cutout_value is \[0.5, 255\], but pixels lie in \[0, 1\]"),
        (
            lambda: Augmentation(cutout=2, cutout_value=[0.5, 0.5])(
                torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 0
            ),
            "cutout_value has 2 numbers, but the images have 3 channels",
        ),
        (lambda: AsymmetricNoise(0.1, draw="other"), "draw is 'other'"),
        (lambda: UniformNoise(1.1), "fraction is 1.1"),
    ],
)
def test_wrong_arguments_get_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
