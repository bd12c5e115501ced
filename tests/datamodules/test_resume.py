"""A run that is cut off and resumed by Lightning reads exactly what an uninterrupted run reads."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from torchlethe.data import Augmentation, ForgetClasses, Interleaved, Sequential
from torchlethe.datamodules import DigitsDataModule, UnlearningDataModule


class Recorder(pl.LightningModule):
    """Notes the indices and a checksum of the augmented images of each step."""

    def __init__(self, feed=None):
        super().__init__()
        self.feed = feed
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list = []

    def training_step(self, batch, batch_idx):
        parts = batch if "image" not in batch else {"train": batch}
        self.seen.append(
            {role: (part["index"].tolist(), float(part["image"].double().sum())) for role, part in parts.items()}
        )
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.layer(torch.ones(1, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, **kwargs) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    kwargs.setdefault("enable_checkpointing", bool(kwargs.get("callbacks")))
    return pl.Trainer(default_root_dir=folder, num_sanity_val_steps=0, devices=1, **quiet, **kwargs)


def data(workers: int, unlearning: bool, validation: float = 0.0):
    digits = DigitsDataModule(
        batch_size=100, subset=500, validation=validation, num_workers=workers, augmentation=Augmentation(crop=1)
    )
    return UnlearningDataModule(digits, ForgetClasses([3]), batch_size=64) if unlearning else digits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 15, "max_epochs": -1}])
@pytest.mark.parametrize("cut", [3, 5, 7, 10])  # an epoch has 5 steps
@pytest.mark.parametrize("feed", [None, Interleaved(every=3, steps=5)])
def test_resume_continues_with_the_very_next_batch(tmp_path, limit, cut, feed):
    unlearning = feed is not None
    whole = Recorder(feed)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=cut, save_top_k=-1, filename="{step}")
    trainer(tmp_path, callbacks=[saver], **limit).fit(whole, data(0, unlearning))
    assert len(whole.seen) == 15
    rest = Recorder(feed)
    resumed = trainer(tmp_path, **limit)
    resumed.fit(rest, data(0, unlearning), ckpt_path=tmp_path / f"step={cut}.ckpt", weights_only=True)
    assert rest.seen == whole.seen[cut:]
    assert resumed.global_step == 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feed", [None, Sequential()])
def test_resume_with_worker_processes_that_had_prefetched(tmp_path, feed):
    unlearning = feed is not None
    plain, whole = Recorder(feed), Recorder(feed)
    trainer(tmp_path, max_epochs=2).fit(plain, data(0, unlearning))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_epochs=2, callbacks=[saver]).fit(whole, data(2, unlearning))
    assert whole.seen == plain.seen
    rest = Recorder(feed)
    trainer(tmp_path, max_epochs=2).fit(rest, data(2, unlearning), ckpt_path=tmp_path / "step=3.ckpt")
    assert rest.seen == whole.seen[3:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}])
def test_resume_from_the_end_of_an_epoch_with_validation(tmp_path, when):
    whole, rest = Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", **when)
    trainer(tmp_path, max_epochs=3, callbacks=[saver]).fit(whole, data(0, False, validation=0.2))
    trainer(tmp_path, max_epochs=3).fit(rest, data(0, False, validation=0.2), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(whole.seen) == 12
    assert rest.seen == whole.seen[4:]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_split_is_refused(tmp_path):
    feed = Interleaved(every=1, steps=2)
    first = trainer(tmp_path, max_steps=1)
    first.fit(Recorder(feed), data(0, True))
    first.save_checkpoint(tmp_path / "last.ckpt")
    other = UnlearningDataModule(DigitsDataModule(subset=500), ForgetClasses([4]))
    with pytest.raises(ValueError, match=r"split hash .* but the checkpoint was made with split"):
        trainer(tmp_path, max_steps=2).fit(Recorder(feed), other, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["test", "validate", "predict"])
def test_a_checkpoint_of_another_split_may_be_evaluated(tmp_path, task):
    class Judge(Recorder):
        def test_step(self, batch, batch_idx):
            self.seen.append(batch["label"])

        validation_step = predict_step = test_step

    first = trainer(tmp_path, max_steps=1)
    first.fit(Recorder(Interleaved(every=1, steps=2)), data(0, True))
    first.save_checkpoint(tmp_path / "last.ckpt")
    judge, other = Judge(), UnlearningDataModule(DigitsDataModule(subset=500, validation=50), ForgetClasses([4]))
    getattr(trainer(tmp_path), task)(judge, other, ckpt_path=tmp_path / "last.ckpt")
    assert len(torch.cat(judge.seen)) == (50 if task == "validate" else 597)
    with pytest.raises(ValueError, match="the checkpoint was made with split"):
        trainer(tmp_path, max_steps=2).fit(judge, other, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unlearning", [False, True])
def test_overfit_batches_and_predict_take_our_loaders(tmp_path, unlearning):
    module = Recorder(Interleaved(every=1, steps=4) if unlearning else None)
    trainer(tmp_path, max_epochs=1, overfit_batches=2).fit(module, data(0, unlearning))
    assert len(module.seen) == 2

    class Predictor(Recorder):
        def predict_step(self, batch, batch_idx):
            return batch["index"]

    predicted = trainer(tmp_path).predict(Predictor(), data(0, unlearning))
    assert torch.cat(predicted).tolist() == list(range(597))
