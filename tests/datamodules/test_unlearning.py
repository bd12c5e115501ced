import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torchlethe.data import (
    Augmentation,
    ForgetClasses,
    ForgetFraction,
    ForgetIndices,
    ForgetSubclasses,
    InMemoryImages,
    Interleaved,
    Joined,
    Single,
    SymmetricNoise,
    find_labels,
)
from torchlethe.datamodules import DigitsDataModule, ImageDataModule, UnlearningDataModule


class Reader(pl.LightningModule):
    """Notes what each step is given."""

    def __init__(self, **declared):
        super().__init__()
        for name, value in declared.items():
            setattr(self, name, value)
        self.layer = torch.nn.Linear(1, 1)
        self.steps: list = []

    def training_step(self, batch, batch_idx):
        self.steps.append(batch)
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, data, **kwargs):
    kwargs = {"max_epochs": 1, "limit_val_batches": 0, **kwargs}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, data)
    return module.steps


def indices(steps):
    return sorted(torch.cat([step["index"] for step in steps]).tolist())


# --- Lethe's own datamodules ----------------------------------------------------------------------------------------


def ready(request=None, **kwargs) -> UnlearningDataModule:
    data = UnlearningDataModule(DigitsDataModule(**kwargs), request or ForgetClasses([3]))
    data.setup()
    return data


def test_evaluation_loaders_of_a_class_request():
    data = ready(validation=100)
    loaders = data.evaluation_loaders()
    assert sorted(loaders) == ["forget", "remain", "test", "test_forget", "test_remain", "validation"]
    read = {name: torch.cat([batch["label"] for batch in loader]) for name, loader in loaders.items()}
    assert read["forget"].unique().tolist() == read["test_forget"].unique().tolist() == [3]
    assert 3 not in read["remain"]
    assert 3 not in read["test_remain"]
    assert len(read["test_forget"]) + len(read["test_remain"]) == len(read["test"]) == 597
    assert len(read["forget"]) + len(read["remain"]) == 1100


def test_evaluation_loaders_of_a_sample_request():
    assert sorted(ready(ForgetFraction(0.1)).evaluation_loaders()) == ["forget", "remain", "test"]


def test_a_test_set_without_subclasses_is_not_divided():
    class Coarse(ImageDataModule):
        num_classes = 2

        def load(self, split):
            fine = torch.arange(16) % 4
            subclasses = fine if split == "train" else None
            return InMemoryImages(torch.zeros(16, 1, 2, 2, dtype=torch.uint8), fine // 2, subclasses=subclasses)

    data = UnlearningDataModule(Coarse(), ForgetSubclasses([1]))
    data.setup()
    assert {name: len(loader.dataset) for name, loader in data.evaluation_loaders().items()} == {
        "forget": 4,
        "remain": 12,
        "test": 16,
    }


def test_an_index_of_the_validation_part_is_named_as_such():
    held_out = ready(validation=100).role_set("validation").indices
    with pytest.raises(ValueError, match=rf"names the index {held_out[5]}, but that sample was held out for valid"):
        ready(ForgetIndices([int(held_out[5])]), validation=100)


def test_request_seed_training_seed_and_unlearning_seed_are_apart():
    digits = {"augmentation": Augmentation(crop=2)}
    base = UnlearningDataModule(DigitsDataModule(**digits), ForgetFraction(0.1, seed=1))
    training = UnlearningDataModule(DigitsDataModule(seed=5, **digits), ForgetFraction(0.1, seed=1))
    unlearning = UnlearningDataModule(DigitsDataModule(**digits), ForgetFraction(0.1, seed=1), seed=5)
    other = UnlearningDataModule(DigitsDataModule(**digits), ForgetFraction(0.1, seed=2))
    steps = [fit(Reader(feed=Single("forget")), data) for data in (base, training, unlearning, other)]
    assert base.split.hash == training.split.hash == unlearning.split.hash != other.split.hash
    first = [one[0] for one in steps]
    assert torch.equal(first[0]["index"], first[1]["index"])
    assert torch.equal(first[0]["image"], first[1]["image"])
    assert not torch.equal(first[0]["index"], first[2]["index"])
    # the augmentation follows the unlearning seed too
    batch = next(iter(base.role_loader("forget", shuffle=True)))
    assert not torch.equal(*(d.on_after_batch_transfer(dict(batch), 0)["image"] for d in (base, unlearning)))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [({"feed": Single("remain")}, "remain"), ({"reads": frozenset({"forget"})}, "forget"), ({}, "train")],
)
def test_a_module_gets_the_role_it_declares(declared, expected):
    data = UnlearningDataModule(DigitsDataModule(), ForgetClasses([3]), batch_size=64)
    steps = fit(Reader(**declared), data)
    assert indices(steps) == data.role_set(expected).indices.sort().values.tolist()
    assert steps[0]["image"].dtype is torch.float32


def test_interleaved_and_joined_batches_arrive_prepared():
    data = UnlearningDataModule(DigitsDataModule(), ForgetClasses([3]), batch_size=64)
    steps = fit(Reader(feed=Interleaved(every=2, steps=4)), data)
    assert [sorted(step) for step in steps] == [["forget", "remain"], ["remain"]] * 2
    assert steps[0]["forget"]["label"].unique().tolist() == [3]
    assert steps[0]["remain"]["image"].max() <= 1
    joined = fit(Reader(feed=Joined()), data)
    assert all(torch.equal(step["is_forget"], step["label"] == 3) for step in joined)


def test_noisy_labels_stay_in_both_parts():
    data = ready(ForgetFraction(0.3), label_noise=SymmetricNoise(0.2))
    noisy = sum(int((data.role_set(r).labels != data.role_set(r).clean_labels).sum()) for r in ("forget", "remain"))
    assert noisy == 240


def test_checkpoint_state_names_the_split_also_before_setup():
    state = ready().state_dict()
    same = UnlearningDataModule(DigitsDataModule(), ForgetClasses([3]))
    same.load_state_dict(state)
    same.setup()
    assert same.state_dict() == state
    other = UnlearningDataModule(DigitsDataModule(), ForgetClasses([5]))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="was made with split"):
        other.setup()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ready(ForgetClasses([10])), "classes contains 10"),
        (lambda: ready(ForgetIndices([1200])), "names the index 1200"),
        (lambda: ready().role_set("validation"), "role is 'validation', but this data has forget, remain"),
        (lambda: UnlearningDataModule(DigitsDataModule(), ForgetClasses([1]), batch_size=0), "batch_size is 0"),
        (
            lambda: fit(
                Reader(reads={"forget", "remain"}), UnlearningDataModule(DigitsDataModule(), ForgetClasses([1]))
            ),
            "reads of Reader is",
        ),
    ],
)
def test_wrong_use_is_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refusal_leaves_the_loaders_of_others_alone():
    with pytest.raises(ValueError, match="has forget, remain"):
        fit(Reader(feed=Single("validation")), UnlearningDataModule(DigitsDataModule(), ForgetClasses([1])))
    assert DataLoader.__init__.__qualname__ == "DataLoader.__init__"
    assert "__old__init__" not in vars(DataLoader)


# --- somebody else's datamodules ------------------------------------------------------------------------------------


class Guarded(Dataset):
    """Pairs with ``targets``; reading a sample that is not of class 1 fails once ``guard`` is set."""

    def __init__(self, count=40, transform=None):
        self.targets = [k % 4 for k in range(count)]
        self.transform = transform
        self.guard = False

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        if self.guard and self.targets[position] != 1:
            raise AssertionError(f"read the remaining sample {position}")
        image = torch.full((1, 2, 2), float(position) / 100)
        return (self.transform(image) if self.transform else image), self.targets[position]


class Foreign(pl.LightningDataModule):
    """A datamodule as other projects write it, with every hook, for tuples."""

    def __init__(self, train, test=None):
        super().__init__()
        self.train, self.test, self.calls = train, test or Guarded(12), []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage == 'fit'}")

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=6)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images, labels

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images + 1, labels

    def state_dict(self):
        return {"answer": 42}

    def load_state_dict(self, state_dict):
        self.restored = state_dict


def test_a_foreign_datamodule_is_divided_and_every_hook_called():
    foreign = Foreign(Guarded())
    data = UnlearningDataModule(foreign, ForgetClasses([1]))
    steps = fit(Reader(feed=Interleaved(every=2, steps=3)), data)
    assert steps[0]["forget"]["label"].unique().tolist() == [1]
    assert len(steps[0]["forget"]["label"]) == 4
    for step in steps:
        for part in step.values():
            torch.testing.assert_close(part["image"][:, 0, 0, 0], part["index"] / 100 + 1)
    assert foreign.calls[0] == "prepare_data"
    assert {"setup fit", "teardown True", "transfer"} <= set(foreign.calls)
    state = data.state_dict()
    data.load_state_dict(state)
    assert foreign.restored == {"answer": 42}


def test_exceptions_reach_the_wrapped_module():
    class Watching(Foreign):
        def on_exception(self, exception):
            self.calls.append(str(exception))

    class Failing(Reader):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("went wrong")

    foreign = Watching(Guarded())
    with pytest.raises(RuntimeError, match="went wrong"):
        fit(Failing(feed=Single("remain")), UnlearningDataModule(foreign, ForgetClasses([1])))
    assert "went wrong" in foreign.calls


def test_the_number_of_classes_is_unknown_until_the_labels_are_read():
    data = UnlearningDataModule(Foreign(Guarded()), ForgetClasses([1]))
    assert data.num_classes is None
    data.setup()
    assert data.num_classes == 4


class Bytes(pl.LightningDataModule):
    """Pairs (or dicts) of uint8 images, as torchvision's `pil_to_tensor` gives them."""

    def __init__(self, collate=None):
        super().__init__()
        self.set = TensorDataset(torch.full((8, 1, 2, 2), 51, dtype=torch.uint8), torch.arange(8) % 2)
        self.collate = collate

    def loader(self):
        return DataLoader(self.set, batch_size=4, collate_fn=self.collate)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def as_hugging_face(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


@pytest.mark.parametrize("collate", [None, as_hugging_face])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)],
)
def test_uint8_images_of_a_foreign_datamodule_reach_every_loop_in_the_precision(collate, precision, dtype):
    class Judge(Reader):
        def test_step(self, batch, batch_idx):
            self.steps.append(batch)

        validation_step = test_step

    data = UnlearningDataModule(Bytes(collate), ForgetClasses([1]))
    module = Judge(feed=Single("remain"))
    fit(module, data, precision=precision, limit_val_batches=1, num_sanity_val_steps=0)
    pl.Trainer(accelerator="cpu", devices=1, logger=False, precision=precision, enable_progress_bar=False).test(
        module, data, verbose=False
    )
    assert len(module.steps) == 4  # one of training, one of validation, two of testing
    assert isinstance(module.steps[1], dict if collate else list)
    for step in module.steps:
        image = (step["image"] if "image" in step else step["pixel_values"]) if isinstance(step, dict) else step[0]
        assert image.dtype is dtype
        torch.testing.assert_close(image, torch.full_like(image, 0.2), atol=1e-3, rtol=0)


def test_hooks_get_the_dicts_of_their_own_loaders_whole():
    class Hooked(Bytes):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "pixel_values": batch["pixel_values"].float()}

    data = UnlearningDataModule(Hooked(as_hugging_face), ForgetClasses([1]))
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert batch["pixel_values"].unique().tolist() == [51]


def test_pairs_are_prepared_to_dicts_outside_of_the_loops():
    data = UnlearningDataModule(Bytes(), ForgetClasses([1]))
    data.setup()
    batch = data.prepare_batch(next(iter(data.test_dataloader())))
    assert sorted(batch) == ["image", "label"]
    torch.testing.assert_close(batch["image"], torch.full((4, 1, 2, 2), 0.2))


def test_a_method_free_of_remaining_data_is_never_handed_any():
    guarded = Guarded()
    guarded.guard = True
    data = UnlearningDataModule(Foreign(guarded), ForgetClasses([1]))
    steps = fit(Reader(feed=Single("forget")), data)
    assert indices(steps) == [k for k in range(40) if k % 4 == 1]
    with pytest.raises(AssertionError, match="read the remaining sample"):
        fit(Reader(feed=Single("remain")), data)


def test_training_data_is_evaluated_with_the_transform_of_the_test_set():
    noisy = Subset(Guarded(40, transform=lambda image: image + torch.rand(1)), list(range(20)))
    data = UnlearningDataModule(Foreign(noisy, Guarded(12, transform=lambda image: image * 2)), ForgetClasses([1]))
    data.setup()
    batch = data.prepare_batch(next(iter(data.evaluation_loaders()["remain"])))
    torch.testing.assert_close(batch["image"][:, 0, 0, 0], batch["index"] / 50 + 1)
    read = next(iter(data.role_loader("remain", shuffle=True)))
    assert not torch.equal(read["image"][:, 0, 0, 0], read["index"] / 50)


def test_hooks_of_the_model_are_called_where_the_datamodule_has_none():
    class Plain(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(8, 1, 2, 2), torch.arange(8) % 2), batch_size=2)

        def test_dataloader(self):
            return self.train_dataloader()

    class Scaling(Reader):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "image": batch["image"] + 7}

    steps = fit(Scaling(feed=Single("remain")), UnlearningDataModule(Plain(), ForgetClasses([0])))
    assert all(step["image"].eq(7).all() for step in steps)


def test_labels_are_found_without_reading_images():
    guarded = Guarded()
    guarded.guard = True
    assert find_labels(Subset(guarded, [3, 2])).tolist() == [3, 2]
    assert find_labels(torch.utils.data.ConcatDataset([guarded, guarded])).tolist() == guarded.targets * 2

    class Pairs(list):
        pass

    assert find_labels(Pairs([(torch.zeros(1), 2), (torch.zeros(1), torch.tensor(1))])).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([(torch.zeros(1), 0.5), (torch.zeros(1), "b")], "no whole-number label per sample"),
        (iter([]), "no data set to divide|only data sets with a length"),
    ],
)
def test_data_that_cannot_be_divided_is_one_sentence(train, message):
    class Odd(Foreign):
        def train_dataloader(self):
            loader = DataLoader([0])
            object.__setattr__(loader, "dataset", train)
            loader.__dict__["dataset"] = train
            return loader

    with pytest.raises(ValueError, match=message):
        UnlearningDataModule(Odd(Guarded()), ForgetClasses([1])).setup()
