"""Editors and methods with teachers under Lightning: checkpoints, resume, ranks, refusals; the update log."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same_bits, digits, forgetful_digits, quiet_trainer, sgd, small_network
from tests.lightning_modules.editor_runs import ALONE, MODULES, Headed, data, joined
from tests.two_ranks import run_two_ranks
from torchlethe.callbacks import CompileNetwork, UpdateLog
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.components.update_archive import UpdateArchive
from torchlethe.data import ForgetClasses, ForgetFraction, ForgetIndices
from torchlethe.io import load_weights, read_state_dict
from torchlethe.lightning_modules import SCRUB, SSD, UNSIR, Amnesiac, BadTeacher, BoundaryShrink, Classifier

EDITORS = tuple(name for name in MODULES if name not in (*ALONE, "scrub", "unsir"))
TRAINED = tuple(name for name in MODULES if name not in EDITORS)
pytestmark = pytest.mark.filterwarnings("ignore:.*chose no weight to dampen")


class Stop(Exception):
    pass


class StopAfter(ModelCheckpoint):
    """Write a checkpoint every few batches, and break off after one of them."""

    def __init__(self, folder, every, stop=-1):
        super().__init__(folder, "last", every_n_train_steps=every, enable_version_counter=False)
        self.stop = stop

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.stop:
            raise Stop


def trainer_for(name, folder, every=1, stop=-1, **arguments):
    return quiet_trainer(
        callbacks=[StopAfter(folder, every, stop)],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        max_epochs=2 if name in ALONE else None,
        **arguments,
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_two_ranks("tests.lightning_modules.editor_runs", folder)
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_two_ranks_compute_what_one_computes(name, two_ranks, tmp_path):
    module = joined(name, 60, tmp_path)
    alone, together = (read_state_dict(folder / f"{name}.safetensors") for folder in (tmp_path, two_ranks))
    before = Headed().double().state_dict()
    assert any(not torch.equal(alone[key], before[key]) for key in alone)
    for key, value in module.network.state_dict().items():
        torch.testing.assert_close(together[key], value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_is_one_step_and_its_checkpoint_holds_the_edit(name, tmp_path):
    module = MODULES[name](small_network())
    trainer = trainer_for(name, tmp_path)
    trainer.fit(module, datamodule=data())
    assert trainer.global_step == 1
    assert trainer.optimizers[0].state_dict()["state"] == {}
    assert_same_bits(load_weights(small_network(1), tmp_path / "last.ckpt"), module.network)
    again = MODULES[name](small_network())
    trainer = trainer_for(name, tmp_path / "again")
    trainer.fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 1
    assert_same_bits(again.network, module.network)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(name, tmp_path):
    every, stop = {"boundary_shrink": (1, 2), "boundary_expand": (1, 2), "unsir": (1, 3)}.get(name, (5, 10))
    with pytest.raises(Stop):
        trainer_for(name, tmp_path, every, stop).fit(MODULES[name](small_network()), datamodule=data())
    resumed, straight = MODULES[name](small_network()), MODULES[name](small_network())
    again = trainer_for(name, tmp_path)
    again.fit(resumed, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    whole = trainer_for(name, tmp_path / "straight")
    whole.fit(straight, datamodule=data())
    assert again.global_step == whole.global_step > stop
    assert_same_bits(resumed, straight)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    own = {key.removeprefix("network.") for key in checkpoint["state_dict"] if key.startswith("network.")}
    assert own == set(small_network().state_dict())


@pytest.mark.parametrize("make", [MODULES["scrub"], MODULES["bad_teacher"]], ids=["scrub", "bad_teacher"])
def test_resuming_with_another_original_is_refused(make, tmp_path):
    name = "scrub" if make is MODULES["scrub"] else "bad_teacher"
    with pytest.raises(Stop):
        trainer_for(name, tmp_path, 3, 3).fit(make(small_network()), datamodule=data())
    with pytest.raises(ValueError, match="made with the original weights"):
        trainer_for(name, tmp_path).fit(make(small_network(1)), datamodule=data(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("ssd", {"forget", "train"}),
        ("influence", {"forget", "remain"}),
        ("fisher_new", {"remain"}),
        ("scrub", {"forget", "remain", "validation"}),
        ("bad_teacher", {"forget", "remain"}),
        ("boundary_shrink", {"forget"}),
        ("boundary_expand", {"forget"}),
        ("unsir", {"forget", "remain"}),
    ],
)
def test_a_method_is_handed_what_it_declares_and_no_more(name, reads):
    datamodule = data()
    asked = []
    module = MODULES[name](small_network())
    datamodule.setup()
    role_set = datamodule.role_set
    datamodule.role_set = lambda role: asked.append(role) or role_set(role)
    quiet_trainer(fast_dev_run=True).fit(module, datamodule=datamodule)
    assert module.reads == set(asked) == reads


def test_bad_teaching_uses_its_share_of_the_remaining_data():
    seen = []
    module = BadTeacher(small_network(), 10, remain_share=0.3)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch) or step(batch, batch_idx)
    datamodule = data()
    quiet_trainer(max_epochs=1).fit(module, datamodule=datamodule)
    flags, index = (torch.cat([batch[key] for batch in seen]) for key in ("is_forget", "index"))
    assert int((~flags).sum()) == int(0.3 * 970)
    assert set(index[flags].tolist()) == set(datamodule.role_set("forget").indices.tolist())
    assert set(index[~flags].tolist()) <= set(datamodule.role_set("remain").indices.tolist())


def test_plain_loaders_by_role_serve_too():
    def loader(count, labels):
        return DataLoader(TensorDataset(torch.rand(count, 1, 8, 8), labels), batch_size=8)

    loaders = {"forget": loader(16, torch.zeros(16, dtype=torch.long)), "remain": loader(40, torch.arange(40) % 9 + 1)}
    for module, steps in (
        (SCRUB(small_network(), 10, epochs=2, msteps=1), 12),
        (UNSIR(small_network(), 10, noise_batch=8, noise_steps=1), 10),
        (SSD(small_network(), 10), 1),
    ):
        given = {"forget": loaders["forget"], "train": loaders["remain"]} if isinstance(module, SSD) else loaders
        trainer = quiet_trainer()
        trainer.fit(module, given)
        assert trainer.global_step == steps
    teacher = BadTeacher(small_network(), 10)
    quiet_trainer(max_epochs=1).fit(teacher, loaders)
    assert teacher.trainer.global_step == 5


@pytest.mark.parametrize("name", ["ssd", "influence", "fisher_new", "scrub", "bad_teacher", "boundary_shrink", "unsir"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_works(name, precision):
    module = MODULES[name](small_network())
    quiet_trainer(precision=precision, max_epochs=1 if name in ALONE else None).fit(module, datamodule=data())
    assert all(torch.isfinite(p).all() for p in module.network.parameters())


def test_what_cannot_work_is_one_sentence():
    with pytest.raises(ValueError, match="precision is 16-true, SCRUB needs bf16-mixed"):
        quiet_trainer(precision="16-true").fit(SCRUB(small_network(), 10), datamodule=data())
    with pytest.raises(ValueError, match="InfluenceUnlearning cannot be compiled"):
        quiet_trainer(callbacks=[CompileNetwork()]).fit(MODULES["influence"](small_network()), datamodule=data())
    with pytest.raises(ValueError, match="UNSIR forgets whole classes"):
        quiet_trainer().fit(UNSIR(small_network(), 10), datamodule=forgetful_digits())
    with pytest.raises(ValueError, match="validation"):
        quiet_trainer().fit(SCRUB(small_network(), 10, rewind=True), datamodule=forgetful_digits())


def test_a_second_fit_starts_anew():
    module = MODULES["ssd"](small_network())
    quiet_trainer().fit(module, datamodule=data())
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data())
    assert trainer.global_step == 1
    shrink = BoundaryShrink(small_network(), 10)
    quiet_trainer(max_epochs=1).fit(shrink, datamodule=data())
    middle = {name: value.clone() for name, value in shrink.network.state_dict().items()}
    quiet_trainer(max_epochs=1).fit(shrink, datamodule=data())
    assert_same_bits(middle, shrink.update.original)


# --- the update log -----------------------------------------------------------------------------------------------


def trained_with_log(folder, candidates, epochs=2, dtype="native", stop=-1, resume=False, **arguments):
    module = Classifier(small_network().double(), 10, sgd())
    trainer = quiet_trainer(
        max_epochs=epochs,
        precision="64-true",
        callbacks=[UpdateLog(candidates, folder / "log", dtype), StopAfter(folder, 4, stop)],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        **arguments,
    )
    trainer.fit(module, datamodule=digits(), ckpt_path=folder / "last.ckpt" if resume else None)
    return module, trainer


def unlearned(network, log, request):
    module = Amnesiac(network, 10, log)
    quiet_trainer(precision="64-true").fit(module, datamodule=forgetful_digits(request))
    return module


def test_taking_back_every_update_ends_at_the_start(tmp_path):
    module, trainer = trained_with_log(tmp_path, ForgetFraction(0.9))
    assert len(UpdateArchive(tmp_path / "log").steps()) == trainer.global_step
    amnesiac = unlearned(module.network, tmp_path / "log", ForgetFraction(0.9))
    for (name, found), expected in zip(amnesiac.network.named_parameters(), small_network().parameters(), strict=True):
        torch.testing.assert_close(found.detach(), expected.detach().double(), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_steps_with_a_forget_sample_are_taken_back(accumulate, tmp_path):
    module, _ = trained_with_log(tmp_path, [3, 5, 700], accumulate_grad_batches=accumulate)
    archive = UpdateArchive(tmp_path / "log")
    assert json.loads((tmp_path / "log" / "update_log.json").read_text())["candidates"] == [3, 5, 700]
    assert len(archive.steps_with(torch.tensor([5]))) == 2  # one an epoch
    expected = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    for path in archive.steps_with(torch.tensor([5])):
        expected = {name: value - archive.read(path)[name] for name, value in expected.items()}
    amnesiac = unlearned(module.network, tmp_path / "log", ForgetIndices([5]))
    for name, found in amnesiac.network.named_parameters():
        torch.testing.assert_close(found.detach(), expected[name], rtol=0, atol=1e-14)


def test_a_resumed_training_ends_in_the_same_log(tmp_path):
    with pytest.raises(Stop):
        trained_with_log(tmp_path, ForgetClasses([3]), stop=10)
    assert not (tmp_path / "log" / "update_log.json").exists()
    with pytest.raises(ValueError, match="is not finished: train to the end first"):
        unlearned(small_network().double(), tmp_path / "log", ForgetClasses([3]))
    trained_with_log(tmp_path, ForgetClasses([3]), resume=True)
    trained_with_log(tmp_path / "straight", ForgetClasses([3]))
    logs = [UpdateArchive(folder / "log") for folder in (tmp_path, tmp_path / "straight")]
    assert logs[0].summary() == logs[1].summary()
    for first, second in zip(logs[0].steps(), logs[1].steps(), strict=True):
        assert_same_bits(logs[0].read(first), logs[1].read(second))


def test_logs_that_do_not_fit_are_one_sentence(tmp_path):
    module, _ = trained_with_log(tmp_path, ForgetClasses([3]), epochs=1, dtype="bfloat16")
    log = tmp_path / "log"
    one = UpdateArchive(log)
    assert next(iter(one.read(one.steps()[0]).values())).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="was written for other weights"):
        unlearned(small_network(1).double(), log, ForgetClasses([3]))
    with pytest.raises(ValueError, match="of the forget set are others"):
        unlearned(module.network, log, ForgetClasses([4]))
    with pytest.raises(ValueError, match="already holds an update log"):
        trained_with_log(tmp_path, ForgetClasses([3]), epochs=1)
    with pytest.raises(ValueError, match="holds no update log"):
        unlearned(module.network, tmp_path / "nowhere", ForgetClasses([3]))
    one.steps()[0].unlink()
    with pytest.raises(ValueError, match=r"has \d+ of \d+ steps"):
        unlearned(module.network, log, ForgetClasses([3]))
    with pytest.raises(ValueError, match="dtype is 'half'"):
        UpdateLog([1], dtype="half")
    with pytest.raises(ValueError, match="candidates has 0 indices"):
        UpdateLog([])
    plain = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), 4)
    for candidates, sentence in (
        ([1], "needs batches with an 'index'"),
        (ForgetClasses([1]), "give a list of indices"),
    ):
        callback = UpdateLog(candidates, tmp_path / "other")
        with pytest.raises(ValueError, match=sentence):
            quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Classifier(small_network(), 10, sgd()), plain)
