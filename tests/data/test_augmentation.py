import pytest
import torch
import torch.nn.functional as F

from torchlethe.data import Augmentation, mix_seed, random_bits

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(1, 256, (64, 3, 12, 10), dtype=torch.uint8, generator=GENERATOR)
INDEX = torch.randperm(1000, generator=GENERATOR)[:64]
EPOCH = torch.full((64,), 3)
EVERYTHING = Augmentation(crop=2, flip=True, cutout=4, rand_augment=2)


def test_the_integer_and_the_tensor_mixer_are_the_published_one():
    # splitmix64 seeded with 1234567: the published first output is 6457827717110365317
    assert mix_seed(1234567) == 6457827717110365317 >> 1
    bits = random_bits(0, torch.zeros(20000, dtype=torch.int64), torch.arange(20000), 2)
    assert bits.min() >= 0
    assert bits.max() < 1 << 32
    values = bits.double() / (1 << 32)
    assert (values.mean(0) - 0.5).abs().max() < 0.01
    assert (values.var(0) - 1 / 12).abs().max() < 0.002
    assert torch.corrcoef(values.T)[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([values[1:, 0], values[:-1, 0]]))[0, 1].abs() < 0.03
    counts = (bits[:, 0] % 9).bincount().double()
    assert ((counts - 20000 / 9) ** 2 / (20000 / 9)).sum() < 26  # chi-square, 8 degrees of freedom, p = 0.001


@pytest.mark.parametrize("augment", [Augmentation(), Augmentation(cutout=5), EVERYTHING])
def test_any_split_into_batches_gives_the_same_images(augment):
    whole = augment(IMAGES, INDEX, EPOCH)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = torch.cat([augment(IMAGES[part], INDEX[part], EPOCH[part]) for part in order.split(7)])
    assert torch.equal(parts, whole[order])


def test_seed_epoch_and_index_each_change_the_images():
    augment = Augmentation(crop=4)
    base = augment(IMAGES, INDEX, EPOCH)
    assert torch.equal(augment(IMAGES, INDEX, EPOCH), base)
    for other in (
        augment(IMAGES, INDEX, EPOCH, seed=1),
        augment(IMAGES, INDEX, EPOCH + 1),
        augment(IMAGES, INDEX + 1, EPOCH),
    ):
        assert (other != base).flatten(1).any(1).float().mean() > 0.9


def test_crop_and_flip_give_windows_of_the_padded_image_and_all_of_them():
    out = Augmentation(crop=1, flip=True)(
        IMAGES[:1].expand(4000, -1, -1, -1), torch.arange(4000), EPOCH[:1].expand(4000)
    )
    padded = F.pad(IMAGES[0], (1, 1, 1, 1))
    windows = [padded[:, dy : dy + 12, dx : dx + 10] for dy in range(3) for dx in range(3)]
    windows = torch.stack([*windows, *[window.flip(-1) for window in windows]])
    which = (out[:, None] == windows).flatten(2).all(2)
    assert which.any(1).all()
    shares = which.double().mean(0)
    assert (shares - 1 / 18).abs().max() < 0.02


def test_cutout_hides_one_square_that_the_border_clips():
    out = Augmentation(crop=0, flip=False, cutout=4)(IMAGES, INDEX, EPOCH)
    hidden = (out == 0).all(1)
    rows, columns = hidden.any(2), hidden.any(1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).max() == 4
    assert rows.sum(1).min() >= 2
    assert torch.equal(out.where(~hidden[:, None], 0), IMAGES.where(~hidden[:, None], 0))


def test_samples_that_are_switched_off_stay_as_they_are():
    switch = torch.arange(64) % 2 == 0
    out = EVERYTHING(IMAGES, INDEX, EPOCH, switch)
    assert torch.equal(out[~switch], IMAGES[~switch])
    assert torch.equal(out[switch], EVERYTHING(IMAGES, INDEX, EPOCH)[switch])


def test_rand_augment_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    EVERYTHING(IMAGES[:4], INDEX[:4], EPOCH[:4])
    assert torch.equal(torch.rand(3), expected)


def test_nothing_switched_on_changes_nothing():
    assert torch.equal(Augmentation(crop=0, flip=False)(IMAGES, INDEX, EPOCH), IMAGES)


@pytest.mark.parametrize("augment", [Augmentation(crop=2), Augmentation(crop=2, cutout=4), EVERYTHING])
def test_the_memory_layout_of_the_batch_does_not_matter(augment):
    images = IMAGES.to(memory_format=torch.channels_last)
    assert torch.equal(augment(images, INDEX, EPOCH), augment(IMAGES, INDEX, EPOCH))


def test_one_pass_number_stands_for_all():
    augment = Augmentation(crop=2)
    assert torch.equal(augment(IMAGES, INDEX, epoch=3), augment(IMAGES, INDEX, EPOCH))


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="crop is -1"):
        Augmentation(crop=-1)
    with pytest.raises(ValueError, match="magnitude is 31"):
        Augmentation(magnitude=31)
