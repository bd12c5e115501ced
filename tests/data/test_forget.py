import json

import numpy as np
import pytest
import torch

from torchlethe.data import (
    AsymmetricNoise,
    ForgetClasses,
    ForgetFraction,
    ForgetIndices,
    ForgetSplit,
    ForgetSubclasses,
    InMemoryImages,
    SymmetricNoise,
)

LABELS = torch.arange(40) % 4
DATA = InMemoryImages(
    torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1),
    LABELS,
    indices=torch.arange(100, 140),
    classes=["cat", "dog", "owl", "bee"],
    subclasses=torch.arange(40) % 8,
    subclass_names=list("abcdefgh"),
)


def test_classes_by_number_or_name():
    assert DATA.labels[ForgetClasses([1, "bee"]).select(DATA)].unique().tolist() == [1, 3]
    assert len(ForgetClasses([0]).select(DATA)) == 10


def test_subclasses_are_part_of_a_class():
    chosen = ForgetSubclasses(["b", 5]).select(DATA)
    assert DATA.subclasses[chosen].unique().tolist() == [1, 5]
    assert DATA.labels[chosen].unique().tolist() == [1]


def test_fraction_depends_on_its_own_seed():
    torch.manual_seed(0)
    first = ForgetFraction(0.33, seed=2).select(DATA)
    torch.manual_seed(1)
    assert torch.equal(ForgetFraction(0.33, seed=2).select(DATA), first)
    assert not torch.equal(ForgetFraction(0.33, seed=3).select(DATA), first)
    assert len(first) == 13


@pytest.mark.parametrize("suffix", [".npy", ".json", ".txt"])
def test_indices_are_original_ones_and_come_from_files(tmp_path, suffix):
    path, wanted = tmp_path / f"forget{suffix}", [139, 100, 107]
    if suffix == ".npy":
        np.save(path, np.array(wanted, dtype=np.int32))
    else:
        path.write_text(json.dumps(wanted) if suffix == ".json" else "139\n100\n107\n")
    positions = ForgetIndices(path).select(DATA)
    assert positions.tolist() == [0, 7, 39]
    assert torch.equal(positions, ForgetIndices(wanted).select(DATA))


def test_split_covers_everything_once_and_describes_itself():
    split = ForgetSplit.create(DATA, ForgetClasses([2]))
    assert sorted([*split.forget.tolist(), *split.remain.tolist()]) == list(range(40))
    assert split.describe() == {"request": "ForgetClasses(classes=[2])", "forget": 10, "remain": 30, "hash": split.hash}


def test_hash_names_the_samples_and_not_the_way_they_were_asked_for():
    split = ForgetSplit.create(DATA, ForgetClasses([2]))
    by_index = ForgetSplit.create(DATA, ForgetIndices(DATA.indices[LABELS == 2].tolist()))
    assert len(split.hash) == 64
    assert by_index.hash == split.hash
    changed = InMemoryImages(255 - DATA.store, LABELS, DATA.indices, DATA.classes)
    others = [
        ForgetSplit.create(DATA, ForgetClasses([1])),
        ForgetSplit.create(changed, ForgetClasses([2])),
        ForgetSplit.create(DATA.subset(range(36)), ForgetClasses([2])),
    ]
    assert len({other.hash for other in [split, *others]}) == 4


def bad_file(name: str, content: bytes):
    def make(folder):
        (folder / name).write_bytes(content)
        return ForgetIndices(folder / name)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: ForgetClasses([]), "classes is empty"),
        (lambda _: ForgetClasses([4]), "classes contains 4, but must hold numbers from 0 to 3"),
        (lambda _: ForgetClasses(["fox"]), "classes contains 'fox'"),
        (lambda _: ForgetClasses([1, "dog"]), "must not name a class twice"),
        (lambda _: ForgetClasses([0, 1, 2, 3]), "selects all 40"),
        (lambda _: ForgetSubclasses([9]), "subclasses contains 9"),
        (lambda _: ForgetFraction(0.01), "selects none of the 40"),
        (lambda _: ForgetFraction(1.0), "fraction is 1.0"),
        (lambda _: ForgetFraction(-0.1), "fraction is -0.1"),
        (lambda _: ForgetIndices([]), "holds no indices"),
        (lambda _: ForgetIndices([100, 140]), "names the index 140, but the training set has 40 samples"),
        (lambda _: ForgetIndices([100, 100]), "names the index 100 twice"),
        (lambda _: ForgetIndices([100.5]), "flat list of whole numbers"),
        (lambda _: ForgetIndices([[100], [101, 102]]), "flat list of whole numbers"),
        (lambda folder: ForgetIndices(folder / "none.npy"), "there is no such file"),
        (bad_file("a.csv", b"1"), r"must end in \.npy, \.json or \.txt"),
        (bad_file("a.txt", b"1 two"), "whole numbers only"),
        (bad_file("a.json", b"{"), "cannot be read"),
        (bad_file("a.json", b'{"a": 1}'), "flat list of whole numbers"),
        (bad_file("a.npy", b"no array"), "source is .*a.npy"),
    ],
)
def test_wrong_requests_are_one_sentence(make, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path).select(DATA)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_file_with_objects_executes_nothing(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npy"):
        ForgetIndices(tmp_path / "evil.npy").select(DATA)


def test_data_without_subclasses_says_so():
    plain = InMemoryImages(DATA.store, LABELS)
    with pytest.raises(ValueError, match="no subclasses; use ForgetClasses"):
        ForgetSubclasses([0]).select(plain)


def test_symmetric_noise_hits_the_exact_share_and_all_wrong_classes():
    clean = torch.arange(10000) % 5
    noisy = SymmetricNoise(0.3, seed=1)(clean, 5)
    assert int((noisy != clean).sum()) == 3000
    shift = (noisy - clean)[noisy != clean] % 5
    assert shift.bincount(minlength=5)[1:].min() > 650
    assert torch.equal(noisy, SymmetricNoise(0.3, seed=1)(clean, 5))
    assert not torch.equal(noisy, SymmetricNoise(0.3, seed=2)(clean, 5))


def test_asymmetric_noise_mistakes_pairs():
    clean = torch.arange(1000) % 4
    noisy = AsymmetricNoise(0.5, pairs={0: 1, 2: 3})(clean, 4)
    assert set(noisy[clean == 0].tolist()) == {0, 1}
    assert torch.equal(noisy[clean == 1], clean[clean == 1])
    shifted = AsymmetricNoise(1.0)(clean, 4)
    assert torch.equal(shifted, (clean + 1) % 4)


def test_wrong_noise_is_one_sentence():
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        SymmetricNoise(1.5)
    with pytest.raises(ValueError, match="pairs names the class 7"):
        AsymmetricNoise(1.0, pairs={0: 7})(LABELS, 4)
