import io
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from torchlethe.data import Augmentation, ForgetClasses, SymmetricNoise
from torchlethe.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    HuggingFaceDataModule,
    ImageFolderDataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
)
from torchlethe.datamodules.cifar import _SUPERCLASS, _SUPERCLASS_NAMES


def setup(data):
    data.prepare_data()
    data.setup("fit")
    return data


def picture(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.full((*size, 3), value, dtype=np.uint8))


# --- digits and the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (32, 3)])
def test_digits_are_stratified_and_always_divided_alike(image_size, channels):
    data = setup(DigitsDataModule(image_size=image_size, channels=channels, seed=7, split_seed=9))
    assert (len(data.train_set), len(data.test_set)) == (1200, 597)
    assert data.train_set.labels.bincount().min() >= 116
    assert torch.equal(data.train_set.labels, setup(DigitsDataModule()).train_set.labels)
    batch = data.prepare_batch(next(iter(data.test_dataloader())))
    assert batch["image"].shape == (128, channels, image_size, image_size)
    assert batch["image"].dtype is torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert "epoch" not in batch


def test_indices_survive_every_split():
    whole = setup(DigitsDataModule()).train_set
    data = setup(DigitsDataModule(subset=600, validation=0.25, drop_classes=[4], label_noise=SymmetricNoise(0.2)))
    train, held_out = data.train_set, data.validation_set
    assert (len(train), len(held_out)) == (450, 150)
    assert not set(train.indices.tolist()) & set(held_out.indices.tolist())
    for part in (train, held_out):
        assert torch.equal(part.clean_labels, whole.labels[part.indices])
        assert torch.equal(part.images, whole.images[part.indices])
        assert 4 not in part.clean_labels
    assert 4 not in data.test_set.labels
    assert int((train.labels != train.clean_labels).sum()) == 90
    assert torch.equal(held_out.labels, held_out.clean_labels)
    sizes = torch.cat([train.clean_labels, held_out.labels]).bincount()
    assert sizes[sizes > 0].tolist() == [67] * 6 + [66] * 3


def test_training_order_and_split_have_their_own_seeds():
    base, order, split = (
        setup(DigitsDataModule(validation=200, **seeds)) for seeds in ({}, {"seed": 1}, {"split_seed": 1})
    )
    assert torch.equal(base.train_set.indices, order.train_set.indices)
    assert not torch.equal(base.train_set.indices, split.train_set.indices)
    first = [next(iter(data.train_dataloader()))["index"] for data in (base, order)]
    assert not torch.equal(*first)


def test_only_training_batches_are_augmented_and_resized_on_the_device():
    data = setup(DigitsDataModule(augmentation=Augmentation(crop=2), input_size=20))
    train, test = next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))
    plain = data.prepare_batch(dict(train))["image"]
    assert plain.shape[-2:] == (20, 20)
    assert 0 <= plain.min() <= plain.max() <= 1
    assert not torch.equal(data.on_after_batch_transfer(dict(train), 0)["image"], plain)
    kept = {**train, "augment": torch.zeros(len(train["label"]), dtype=torch.bool)}
    assert torch.equal(data.on_after_batch_transfer(kept, 0)["image"], plain)
    assert torch.equal(data.on_after_batch_transfer(dict(test), 0)["image"], data.prepare_batch(test)["image"])


def test_batches_of_other_projects_pass_through():
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    batch = DigitsDataModule().on_after_batch_transfer((images, labels), 0)
    assert torch.equal(batch["image"], images)


def test_half_precision_reaches_the_network(tmp_path):
    class Seen(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            self.dtype_seen = batch["image"].dtype

        def configure_optimizers(self):
            return None

    module = Seen()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        precision="bf16-true",
        accelerator="cpu",
        fast_dev_run=True,
        enable_progress_bar=False,
    )
    trainer.fit(module, DigitsDataModule())
    assert module.dtype_seen is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"validation": -1}, "validation is -1"),
        ({"validation": 1.5}, r"validation is 1\.5"),
        ({"validation": 1200}, "validation is 1200, but the training set has 1200"),
        ({"subset": 1200}, "subset is 1200, but the smallest class has"),
        ({"drop_classes": [10]}, "drop_classes contains 10, but classes are 0…9"),
        ({"drop_classes": list(range(10))}, "some class must be left"),
        ({"augmentation": "strong"}, "augmentation is 'strong'"),
        ({"image_size": 16}, "image_size is 16"),
        ({"channels": 2}, "channels is 2"),
        ({"test_size": 0}, "test_size is 0"),
        ({"label_noise": SymmetricNoise(0.1), "input_size": 0}, "input_size is 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        setup(DigitsDataModule(**arguments))
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule, TinyImageNetDataModule, ImageFolderDataModule]
)
def test_missing_data_is_one_sentence_that_says_what_to_do(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^root is .*\.$") as error:
        setup(data(tmp_path / "none"))
    assert "\n" not in str(error.value)


def test_digits_of_house_numbers_are_not_mirrored():
    assert not SVHNDataModule().augmentation.flip
    assert CIFAR10DataModule().augmentation.flip


def test_superclasses_of_cifar100_have_five_classes_each():
    assert torch.tensor(_SUPERCLASS).bincount().tolist() == [5] * 20
    assert len(_SUPERCLASS_NAMES) == 20


@pytest.fixture(params=["official", "plain"])
def tiny_imagenet(request, tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(["n01", "n02"]):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for k in range(3):
            picture(100 * label + k).save(folder / f"{name}_{k}.png")
        if request.param == "plain":
            (root / "val" / name).mkdir(parents=True)
            picture(100 * label).save(root / "val" / name / "a.png")
    if request.param == "official":
        (root / "val" / "images").mkdir(parents=True)
        for k, label in enumerate([1, 0]):
            picture(100 * label).save(root / "val" / "images" / f"val_{k}.png")
        (root / "val" / "val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t9\t9\nval_1.png\tn01\t0\t0\t9\t9\n")
    return root


@pytest.mark.parametrize("in_memory", [True, False])
def test_tiny_imagenet_in_both_layouts(tiny_imagenet, in_memory):
    data = setup(TinyImageNetDataModule(tiny_imagenet, in_memory=in_memory))
    assert data.train_set.labels.tolist() == [0, 0, 0, 1, 1, 1]
    test = data.test_set[range(2)]
    assert torch.equal(test["image"][:, 0, 0, 0].long(), 100 * test["label"])
    assert test["image"].shape == (2, 3, 64, 64)


def test_image_folder_resizes_crops_and_streams_through_workers(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(["b", "a"]):
            folder = tmp_path / split / name / "deeper"
            folder.mkdir(parents=True)
            for k in range(count):
                picture(60 * label + k, (40, 80 + k)).save(folder / f"{k}.png")
    data = setup(ImageFolderDataModule(tmp_path, image_size=28, num_workers=2, batch_size=4, validation=2))
    assert data.classes == ["a", "b"]
    assert data.num_classes == 2
    batches = list(data.train_dataloader())
    assert batches[0]["image"].shape == (4, 3, 28, 28)
    assert batches[0]["image"].dtype is torch.uint8
    stored = {int(k): 60 + int(k) if k < 4 else int(k) - 4 for k in range(8)}
    for batch in batches:
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            assert image.unique().tolist() == [stored[index]]
    assert len(data.train_set.fingerprint()) == 64


def test_a_test_class_without_training_images_is_refused(tmp_path):
    for folder in ("train/a", "val/a", "val/new"):
        (tmp_path / folder).mkdir(parents=True)
        picture(1).save(tmp_path / folder / "x.png")
    with pytest.raises(ValueError, match="class folder 'new', which the training set lacks"):
        setup(ImageFolderDataModule(tmp_path, image_size=8))


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def write(name: str, labels: list[int], features=True, size=(6, 6)):
        cells = []
        for k in range(len(labels)):
            buffer = io.BytesIO()
            picture(k, size).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])} if features else None
        table = datasets.Dataset.from_dict({"img": cells, "label": labels}, datasets.Features(kinds) if kinds else None)
        table.to_parquet(str(tmp_path / name))

    write.folder = tmp_path
    return write


def test_parquet_folder_keeps_class_names_and_decodes_alike_in_both_ways(parquet):
    parquet("train-0.parquet", [0, 1, 1, 0, 1])
    parquet("test.parquet", [1, 0])
    memory = setup(HuggingFaceDataModule(parquet.folder, augmentation=None))
    stream = setup(HuggingFaceDataModule(parquet.folder, in_memory=False, num_workers=0))
    assert memory.classes == ["cat", "dog"]
    assert memory.num_classes == 2
    assert memory.train_set.images[:, 0, 0, 0].tolist() == list(range(5))
    assert torch.equal(memory.train_set.images, stream.train_set[range(5)]["image"])
    assert memory.test_set.labels.tolist() == [1, 0]
    assert setup(CIFAR10DataModule(parquet.folder)).train_set.labels.tolist() == [0, 1, 1, 0, 1]


def test_without_a_test_split_a_stratified_part_is_held_out(parquet):
    parquet("data.parquet", [0, 1] * 10, features=False)
    data = setup(HuggingFaceDataModule(parquet.folder / "data.parquet", test_size=0.2))
    assert data.test_set.labels.bincount().tolist() == [2, 2]
    assert len(data.train_set) == 16
    assert not set(data.train_set.indices.tolist()) & set(data.test_set.indices.tolist())


def test_the_cache_spares_the_decoding(parquet, monkeypatch):
    parquet("train.parquet", [0, 1, 0])
    parquet("test.parquet", [0])
    cache = parquet.folder / "cache"
    first = setup(HuggingFaceDataModule(parquet.folder, cache_dir=cache))
    assert len(list(cache.iterdir())) == 2

    def refuse(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr("torchlethe.data.streaming.DecodedImages.read", refuse)
    again = setup(HuggingFaceDataModule(parquet.folder, cache_dir=cache))
    assert torch.equal(again.train_set.images, first.train_set.images)
    monkeypatch.undo()
    parquet("train.parquet", [0, 1, 1])
    assert setup(HuggingFaceDataModule(parquet.folder, cache_dir=cache)).train_set.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_column": "photo"}, ValueError, "image_column is 'photo', but the columns are img, label"),
        ({"label_column": "y"}, ValueError, "label_column is 'y'"),
        ({"test_split": "dev"}, ValueError, "test_split is 'dev', but the data set has train"),
        ({"test_size": 0}, ValueError, "test_size is 0"),
    ],
)
def test_wrong_columns_and_splits_are_one_sentence(parquet, arguments, error, message):
    parquet("train.parquet", [0, 1] * 5)
    with pytest.raises(error, match=message):
        setup(HuggingFaceDataModule(parquet.folder, **arguments))


def test_a_missing_path_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        setup(HuggingFaceDataModule(tmp_path / "none"))


@pytest.mark.parametrize("make", [CIFAR10DataModule, HuggingFaceDataModule])
def test_without_the_datasets_library_the_message_says_what_to_install(make, tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchlethe\[datasets\]'"):
        setup(make(tmp_path))


@pytest.mark.shared
def test_cifar10_parquet_of_the_shared_folder(shared_dir):
    data = setup(HuggingFaceDataModule(shared_dir / "data" / "cifar10", in_memory=False, subset=10000))
    assert data.classes[0] == "airplane"
    assert data.train_set.labels.bincount().tolist() == [1000] * 10
    assert data.train_set[[0, 1]]["image"].shape == (2, 3, 32, 32)
    assert len(data.test_set) == 10000
    assert len(ForgetClasses(["airplane"]).select(data.train_set)) == 1000
