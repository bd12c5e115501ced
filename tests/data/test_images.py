import numpy as np
import pytest
import torch

from torchlethe.data import (
    PADDING_INDEX,
    PADDING_LABEL,
    InMemoryImages,
    as_batch,
    class_balanced,
    model_input,
    stratified,
)


@pytest.fixture
def images() -> InMemoryImages:
    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2).contiguous()
    return InMemoryImages(pixels, [0, 1, 2, 0, 1, 2], classes=["a", "b", "c"])


def test_batch_is_read_in_the_order_asked(images):
    batch = images[[4, 0, 5]]
    assert batch["image"][:, 0, 0, 0].tolist() == [4, 0, 5]
    assert batch["label"].tolist() == [1, 0, 2]
    assert batch["index"].tolist() == [4, 0, 5]
    assert batch["image"].dtype is torch.uint8


def test_single_sample_has_no_batch_dimension(images):
    sample = images[-1]
    assert sample["image"].shape == (1, 2, 2)
    assert int(sample["index"]) == 5
    with pytest.raises(IndexError):
        images[6]


def test_negative_position_of_a_batch_is_a_flagged_duplicate(images):
    batch = images[[2, ~3]]
    assert batch["image"][:, 0, 0, 0].tolist() == [2, 3]
    assert batch["label"].tolist() == [2, PADDING_LABEL]
    assert batch["index"].tolist() == [2, PADDING_INDEX]
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_subset_of_a_subset_keeps_original_indices_and_shares_the_store(images):
    view = images.subset([5, 3, 1]).subset(torch.tensor([True, False, True]))
    assert view[[0, 1]]["index"].tolist() == [5, 1]
    assert view.images[:, 0, 0, 0].tolist() == [5, 1]
    assert view.store.data_ptr() == images.store.data_ptr()


def test_noisy_labels_keep_the_clean_ones(images):
    noisy = images.with_labels(torch.tensor([1, 1, 2, 0, 1, 0])).subset([0, 5])
    assert noisy.labels.tolist() == [1, 0]
    assert noisy.clean_labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"must lie in 0…2"):
        images.with_labels(torch.full((6,), 3))


def test_fingerprint_covers_pixels_labels_and_indices(images):
    same = InMemoryImages(images.store.clone(), images.labels.clone())
    assert same.fingerprint() == images.fingerprint()
    changed = images.store.clone()
    changed[3, 0, 1, 1] += 1
    others = [
        InMemoryImages(changed, images.labels),
        images.with_labels(torch.tensor([0, 1, 2, 0, 1, 1])),
        images.subset([1, 0, 2, 3, 4, 5]),
        InMemoryImages(images.store, images.labels, indices=torch.arange(1, 7)),
        InMemoryImages(images.store.view(6, 1, 1, 4), images.labels),
    ]
    assert len({other.fingerprint() for other in [images, *others]}) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InMemoryImages(torch.zeros(2, 1, 2, 2), [0, 1]), "must be uint8"),
        (lambda: InMemoryImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [0]), "images has 2 entries"),
        (lambda: InMemoryImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [-1]), "start at 0"),
        (lambda: InMemoryImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [2], classes=["a"]), "only 1 names"),
    ],
)
def test_wrong_contents_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("batch", [(torch.zeros(2, 1), [0, 1]), {"img": torch.zeros(2, 1), "labels": [0, 1]}])
def test_foreign_batches_become_dicts(batch):
    assert set(as_batch(batch)) == {"image", "label"}


@pytest.mark.parametrize("batch", [torch.zeros(3), {"x": 1}, "ab", (1,)])
def test_a_batch_without_images_and_labels_is_refused(batch):
    with pytest.raises(ValueError, match=r"^batch .*\.$"):
        as_batch(batch)


def test_arrays_are_taken_as_tensors_are(images):
    same = InMemoryImages(images.store.numpy(), images.labels.numpy(), classes=images.classes)
    assert same.fingerprint() == images.fingerprint()
    with pytest.raises(ValueError, match=r"images is torch\.float64 \(1, 1, 2, 2\), but must be uint8"):
        InMemoryImages(np.zeros((1, 1, 2, 2)), [0])


PIXELS = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("form", [lambda x, y: [x, y], lambda x, y: {"pixel_values": x, "labels": y, "name": "a"}])
def test_foreign_batches_become_what_network_and_loss_read(form, dtype):
    batch = model_input(form(PIXELS, torch.tensor([2, 0, 1], dtype=dtype)))
    torch.testing.assert_close(batch["image"].flatten(), torch.tensor([0, 0.2, 1]))
    assert batch["label"].dtype is torch.int64
    assert batch["label"].tolist() == [2, 0, 1]


def test_a_batch_that_fits_passes_through_and_a_callers_batch_is_not_changed():
    ready = {"image": torch.full((3, 1, 1, 1), 7.0, dtype=torch.bfloat16), "label": torch.tensor([0, 1, 2])}
    assert model_input(ready) is ready
    raw = {"image": PIXELS, "label": [0, 1, 2]}
    assert model_input(raw)["label"].dtype is torch.int64
    assert raw == {"image": PIXELS, "label": [0, 1, 2]}
    assert as_batch(raw)["image"].dtype is torch.uint8


@pytest.mark.parametrize("label", [torch.rand(3), torch.rand(3, 10), ["a", "b", "c"]])
def test_labels_that_are_no_class_numbers_are_one_sentence(label):
    with pytest.raises(ValueError, match=r"^label is .*whole class numbers.*\.$"):
        model_input((PIXELS, label))


def test_the_message_of_class_balanced_names_the_largest_count_that_works():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="has 1 to 7"):
        class_balanced(labels, 8)
    assert len(class_balanced(labels, 7)) == 7


def test_stratified_keeps_class_shares_and_balanced_equalises_them():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    assert labels[stratified(labels, 20)].bincount().tolist() == [12, 6, 2]
    assert labels[class_balanced(labels, 29)].bincount().tolist() == [10, 10, 9]
    assert torch.equal(stratified(labels, 20, seed=4), stratified(labels, 20, seed=4))
    assert not torch.equal(stratified(labels, 20, seed=4), stratified(labels, 20, seed=5))
    with pytest.raises(ValueError, match="smallest class has 10"):
        class_balanced(labels, 33)
    with pytest.raises(ValueError, match="count is 100"):
        stratified(labels, 100)
