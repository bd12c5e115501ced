"""Protected data sets on disk: written once, checked, read by plain libraries, continued after a kill."""

import csv
import hashlib
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from torchlethe.data import InMemoryImages, read_protected
from torchlethe.data.protected import ReplacedImages, check_fits, choose_protected, in_memory
from torchlethe.data.protected_formats import FORMATS, class_folders
from torchlethe.data.publishing import ProtectedStore, allowance, measure_change

BOUND = {"norm": "inf", "value": 4}


def images(count=23, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 256, (count, channels, 6, 5), generator=generator, dtype=torch.uint8)
    change = torch.randint(-4, 5, clean.shape, generator=generator)
    protected = (clean.int() + change).clamp(0, 255).byte()
    return clean, protected, torch.arange(count) % 3, torch.arange(count) * 2 + 1


def filled(folder, channels=3, order=((0, 9), (9, 23)), formats=tuple(FORMATS), key="ab"):
    clean, protected, label, index = images(channels=channels)
    store = ProtectedStore(folder, key, formats, BOUND)
    for low, high in order:
        rows = slice(low, high)
        store.add(index[rows], label[rows], clean[rows], protected[rows])
    return store


@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_is_read_bit_exact_without_lethe(channels, tmp_path):
    _, protected, label, index = images(channels=channels)
    manifest = filled(tmp_path / "set", channels).finish(["cat", "dog", "owl"], expected=23)
    arrays = np.load(tmp_path / "set" / "protected.npz")
    np.testing.assert_array_equal(arrays["image"], protected.numpy())
    np.testing.assert_array_equal(arrays["label"], label.numpy())
    np.testing.assert_array_equal(arrays["index"], index.numpy())
    pictures = protected.permute(0, 2, 3, 1).squeeze(-1).numpy()
    for i, picture in zip(index.tolist(), pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "set" / "flat" / f"{i}.png")), picture)
    folder = ImageFolder(tmp_path / "set" / "images", loader=lambda path: np.asarray(Image.open(path)))
    assert folder.classes == ["cat", "dog", "owl"]
    assert len(folder) == 23
    for (path, target), (picture, _) in zip(folder.samples, folder, strict=True):
        row = (int(path.rsplit("/", 1)[1][:-4]) - 1) // 2
        assert target == label[row]
        np.testing.assert_array_equal(picture, pictures[row])
    rows = pq.read_table(tmp_path / "set" / "train-00000-of-00001.parquet").to_pylist()
    assert [row["index"] for row in rows] == index.tolist()
    assert [row["label"] for row in rows] == label.tolist()
    for row, picture in zip(rows, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), picture)
    assert manifest["verified"] == manifest["verified"] | {"images": 23, "largest": 4.0, "allowed": 4.0}


def test_hugging_face_reads_images_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    _, protected, label, _ = images()
    filled(tmp_path / "set", formats=["parquet"]).finish(["cat", "dog", "owl"])
    files = {"train": str(tmp_path / "set" / "train-00000-of-00001.parquet")}
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert found.features["label"].names == ["cat", "dog", "owl"]
    assert found["label"] == label.tolist()
    for row, image in zip(found, protected, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())


def test_manifest_and_listing_say_what_can_be_checked(tmp_path):
    clean, protected, _, index = images()
    manifest = filled(tmp_path / "set").finish(["cat", "dog", "owl"], about={"method": {"method": "Noise"}})
    digests = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in clean)
    assert manifest["source"]["sha256"] == hashlib.sha256(digests).hexdigest()
    npz = (tmp_path / "set" / "protected.npz").read_bytes()
    assert manifest["files"]["npz"]["sha256"] == hashlib.sha256(npz).hexdigest()
    assert json.loads((tmp_path / "set" / "manifest.json").read_text()) == manifest
    with (tmp_path / "set" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    change = (protected.int() - clean.int()).abs()
    assert [int(row["index"]) for row in rows] == index.tolist()
    assert [int(row["largest_change"]) for row in rows] == change.flatten(1).amax(1).tolist()
    assert [int(row["changed_pixels"]) for row in rows] == (change > 0).any(1).flatten(1).sum(1).tolist()
    assert not (tmp_path / "set" / "parts").exists()


def test_order_and_size_of_batches_do_not_show(tmp_path):
    """As the ranks of a run write them: every second image, in batches of their own."""
    first = filled(tmp_path / "one").finish(["cat", "dog", "owl"])
    clean, protected, label, index = images()
    for rank in range(2):
        store = ProtectedStore(tmp_path / "two", "ab", tuple(FORMATS), BOUND)
        for rows in torch.arange(rank, 23, 2).flip(0).split(3):
            store.add(index[rows], label[rows], clean[rows], protected[rows])
    second = store.finish(["cat", "dog", "owl"])
    assert first == second


def test_a_store_goes_on_and_is_done_once(tmp_path):
    store = filled(tmp_path / "set", order=((9, 23),))
    assert store.finished().tolist() == images()[3][9:].tolist()
    with pytest.raises(ValueError, match="has 14 of 23 protected images"):
        store.finish(["cat", "dog", "owl"], expected=23)
    again = filled(tmp_path / "set", order=((0, 9),))
    manifest = again.finish(["cat", "dog", "owl"], expected=23)
    before = (tmp_path / "set" / "protected.npz").stat().st_mtime_ns
    later = ProtectedStore(tmp_path / "set", "ab", tuple(FORMATS), BOUND)
    assert later.finished().tolist() == images()[3].tolist()
    filled(tmp_path / "set", order=((0, 9),))
    assert not (tmp_path / "set" / "parts").exists()
    assert later.finish(["cat", "dog", "owl"]) == manifest
    assert (tmp_path / "set" / "protected.npz").stat().st_mtime_ns == before


def test_what_breaks_the_promise_is_refused(tmp_path):
    clean, protected, label, index = images()
    store = ProtectedStore(tmp_path / "set", "ab", ["npz"], {"norm": "inf", "value": 3})
    with pytest.raises(ValueError, match=r"was changed by 4 in the norm 'inf', but the method's bound is 3"):
        store.add(index, label, clean, protected)
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="must be uint8"):
        store.add(index, label, clean, protected.float())
    with pytest.raises(ValueError, match=r"clean images are .*, but must be uint8 \(B, C, H, W\)"):
        store.add(index, label, clean[:, 0], protected[:, 0])
    with pytest.raises(ValueError, match=r"label is torch\.int64 \(23, 3\), but must hold a whole class number"):
        store.add(index, torch.eye(3, dtype=torch.int64)[label], clean, protected)
    for classes in (["cat", "dog"], "cat", 3):
        with pytest.raises(ValueError, match="must be a list with a name for each of the 3 classes"):
            filled(tmp_path / "named", formats=["npz"]).finish(classes)
        assert not (tmp_path / "named" / "protected.npz").exists()
    store = ProtectedStore(tmp_path / "set", "ab", ["npz"], {"norm": "pixels", "value": 1})
    with pytest.raises(ValueError, match="norm 'pixels'"):
        store.add(index, label, clean, protected)


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no protected data"):
        ProtectedStore(tmp_path / "full", "ab", ["npz"], BOUND)
    filled(tmp_path / "set")
    with pytest.raises(ValueError, match="another method, settings, precision, source or formats"):
        ProtectedStore(tmp_path / "set", "cd", ["npz"], BOUND)
    with pytest.raises(ValueError, match="formats contains 'jpeg'"):
        ProtectedStore(tmp_path / "new", "ab", ["jpeg"], BOUND)
    with pytest.raises(ValueError, match="norm is 'l7'"):
        ProtectedStore(tmp_path / "new", "ab", ["npz"], {"norm": "l7", "value": 1})


def test_damage_on_the_way_to_the_disk_is_noticed(tmp_path, monkeypatch):
    from torchlethe.data import protected_formats

    def lossy(image):
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    monkeypatch.setattr(protected_formats, "encode_png", lossy)
    with pytest.raises(OSError, match="reading it back gives other pixels"):
        filled(tmp_path / "set", formats=["png_flat"]).finish(["cat", "dog", "owl"])
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_channels_that_no_picture_holds_need_npz(tmp_path):
    with pytest.raises(ValueError, match="have 2 channels: take 'npz'"):
        filled(tmp_path / "set", channels=2).finish()
    assert filled(tmp_path / "other", channels=2, formats=["npz"]).finish()["shape"] == [2, 6, 5]


@pytest.mark.parametrize("name", [*FORMATS, "folder"])
def test_reading(name, tmp_path):
    _, protected, label, index = images()
    filled(tmp_path / "set").finish(["cat", "dog", "owl"])
    places = {"png": "images", "png_flat": "flat", "npz": "protected.npz", "parquet": "train-00000-of-00001.parquet"}
    found = read_protected(tmp_path / "set" / places.get(name, "."))
    assert torch.equal(found.images, protected)
    assert torch.equal(found.indices, index)
    assert torch.equal(found.labels, label)
    assert bool(found.manifest) == (name == "folder")


def test_reading_refuses_what_is_not_there_or_not_done(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_protected(tmp_path / "nothing")
    filled(tmp_path / "set")
    with pytest.raises(ValueError, match="is unfinished: run its `predict` again"):
        read_protected(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no files '<index>\.png'"):
        read_protected(tmp_path / "empty")
    np.savez(tmp_path / "other.npz", picture=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'image'"):
        read_protected(tmp_path / "other.npz")
    (tmp_path / "images.csv").write_text("index,label\n")
    with pytest.raises(ValueError, match=r"images\.csv', but must be a folder, an \.npz or a \.parquet file"):
        read_protected(tmp_path / "images.csv")
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    for name in ("text.npz", "objects.npz"):
        with pytest.raises(ValueError, match=rf"'{tmp_path}/{name}', but that is no \.npz file of plain arrays\.$"):
            read_protected(tmp_path / name)
    for name in ("broken.npz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(ValueError, match=rf"'{tmp_path}/{name}' cannot be read"):
            read_protected(tmp_path / name)


def test_folders_above_or_beside_a_data_set_are_not_guessed(tmp_path):
    filled(tmp_path / "runs" / "one").finish()
    with pytest.raises(ValueError, match=f"above the protected data set '{tmp_path}/runs/one': name that"):
        read_protected(tmp_path / "runs")
    for number in range(2):
        (tmp_path / "pictures" / str(number)).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / str(number) / "7.png")
    with pytest.raises(ValueError, match="several files there have the index"):
        read_protected(tmp_path / "pictures")


def test_euclidean_bounds_allow_for_rounding():
    assert allowance({"norm": "2", "value": 1.0}, 300) == pytest.approx(1 + 300**0.5 * 0.5 / 255)
    clean = torch.full((1, 3, 10, 10), 100, dtype=torch.uint8)
    found = measure_change(clean, clean + 2)
    assert found["2"].item() == pytest.approx(300**0.5 * 2 / 255)
    assert found["pixels"].item() == 100


def test_class_folders_keep_the_order_of_labels():
    names = [str(number) for number in range(12)]
    folders = class_folders(names)
    assert sorted(folders) == folders
    assert len(set(folders)) == 12
    assert class_folders(["b/c", ""]) == ["0_b_c", "1_"]


def test_a_smaller_share_is_part_of_a_larger_one():
    data = InMemoryImages(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100) % 4)
    half = choose_protected(data, data.indices, ratio=0.5)
    most = choose_protected(data, data.indices, ratio=0.8)
    assert int(half.sum()) == 50
    assert int(most.sum()) == 80
    assert bool((most | ~half).all())
    assert choose_protected(data, torch.tensor([7, 8]), classes=[3]).nonzero().flatten().tolist() == [7]
    assert choose_protected(data, data.indices, indices=torch.tensor([5])).nonzero().flatten().tolist() == [5]


def test_replaced_images_keep_everything_else():
    clean, protected, label, index = images()
    data = InMemoryImages(clean, label, index, classes=["a", "b", "c"])
    rows = torch.tensor([20, 3])
    replaced = ReplacedImages(data, rows, protected[rows])
    expected = clean.clone()
    expected[rows] = protected[rows]
    assert torch.equal(in_memory(replaced).images, expected)
    assert torch.equal(replaced.subset([3, 4])[[0, 1]]["image"], torch.stack([protected[3], clean[4]]))
    assert torch.equal(replaced[[20]]["label"], label[[20]])
    assert replaced.fingerprint() != data.fingerprint()
    # a view that is no whole store
    part = ReplacedImages(data.subset([5, 3]), torch.tensor([1]), protected[[3]])
    assert torch.equal(in_memory(part).images, torch.stack([clean[5], protected[3]]))


def test_data_of_another_set_are_refused(tmp_path):
    clean, _, label, index = images()
    filled(tmp_path / "set", formats=["npz"]).finish()
    found = read_protected(tmp_path / "set")
    check_fits(InMemoryImages(clean, label, index), found)
    with pytest.warns(UserWarning, match="has 23 images, and 3 of them have an index beyond the training set's"):
        check_fits(InMemoryImages(clean[:20], label[:20], index[:20]), found)
    with pytest.raises(ValueError, match="has other labels"):
        check_fits(InMemoryImages(clean, (label + 1) % 3, index), found)
    with pytest.raises(ValueError, match="shares no index"):
        check_fits(InMemoryImages(clean, label, index + 1000), found)
    with pytest.raises(ValueError, match="more than its bound 4"):
        check_fits(InMemoryImages(255 - clean, label, index), found)
    with pytest.raises(ValueError, match=r"has images \(3, 6, 5\)"):
        check_fits(InMemoryImages(clean[..., :4], label, index), found)
