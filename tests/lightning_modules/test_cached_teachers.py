"""Asking a teacher once for each sample gives the run that asking it at every step gives."""

import pytest
import torch
from torch import nn

from tests.helpers import assert_same_bits, digits, forgetful_digits, quiet_trainer, sgd, small_network
from torchlethe.components.teacher_logits import TeacherLogits
from torchlethe.data import Augmentation, ForgetFraction
from torchlethe.datamodules import UnlearningDataModule
from torchlethe.lightning_modules import SCRUB, BadTeacher

MODULES = {
    "scrub": lambda **kwargs: SCRUB(small_network(), 10, epochs=2, msteps=1, optimizer=sgd(5e-3), **kwargs),
    "bad_teacher": lambda **kwargs: BadTeacher(small_network(), 10, optimizer=sgd(0.05), **kwargs),
}


def fit(name, data=None, **kwargs):
    module = MODULES[name](**kwargs)
    trainer = quiet_trainer(max_epochs=2 if name == "bad_teacher" else None)
    trainer.fit(module, datamodule=data or forgetful_digits())
    return module, trainer


class Counted(nn.Module):
    """Counts the images that a network is asked about."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, 0

    def forward(self, image):
        self.seen += len(image)
        return self.network(image)


@pytest.mark.parametrize("name", MODULES)
def test_a_cached_teacher_gives_the_same_numbers_and_is_asked_once(name):
    plain, _ = fit(name)
    module = MODULES[name](cache_teacher=True)
    place = module.update.configure

    def configure(network):
        optimizers = place(network)
        module.update._original = Counted(module.update.original)
        return optimizers

    module.update.configure = configure
    data = forgetful_digits()
    quiet_trainer(max_epochs=2 if name == "bad_teacher" else None).fit(module, datamodule=data)
    for first, second in zip(plain.network.state_dict().values(), module.network.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    samples = len(data.split.remain) + (len(data.split.forget) if name == "scrub" else 0)
    assert samples <= module.update.original.seen <= samples + 2 * 64  # the first batch of each role is asked again


@pytest.mark.parametrize("name", MODULES)
def test_augmented_images_are_refused(name):
    with pytest.raises(ValueError, match="cache_teacher is set, but training images differ from those the teacher was"):
        fit(name, forgetful_digits(augmentation=Augmentation(crop=1)), cache_teacher=True)


def test_samples_are_known_by_their_index():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    image = torch.rand(4, 1, 2, 2)
    batch = {"image": image, "label": torch.tensor([0, 1, 0, -100]), "index": torch.tensor([9, 3, 6, -1])}
    cached = TeacherLogits(teacher, [batch])
    assert cached.index.tolist() == [3, 6, 9]
    asked = {"image": image[[2, 0]], "label": torch.zeros(2), "index": torch.tensor([6, 9])}
    torch.testing.assert_close(cached(asked), teacher(asked["image"]))
    with pytest.raises(ValueError, match="the batches have no `index` to know a sample by"):
        TeacherLogits(teacher, [(image, batch["label"])])
    with pytest.raises(ValueError, match="there are no samples to ask the teacher about"):
        TeacherLogits(teacher, [])


def test_scrub_takes_forget_batches_of_their_own_size():
    data = UnlearningDataModule(digits(), ForgetFraction(0.1))
    seen = {"forget": [], "remain": []}
    module = MODULES["scrub"](forget_batch_size=20)
    step = module.update.step

    def noted(network, batch, k, *args):
        for role, part in batch.items():
            seen[role].append(part["index"])
        return step(network, batch, k, *args)

    module.update.step = noted
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data)
    assert [len(index) for index in seen["forget"]] == [20] * 6  # 120 images, one pass
    assert [len(index) for index in seen["remain"]] == [*[64] * 16, 56] * 2
    assert torch.equal(torch.cat(seen["forget"]).sort().values, data.role_set("forget").indices)
    assert trainer.global_step == 6 + 2 * 17 == module.update.steps
    same, _ = fit("scrub", forget_batch_size=64)
    assert_same_bits(same.network, fit("scrub")[0].network)
    with pytest.raises(ValueError, match="forget_batch_size is 0, it must be at least 1"):
        SCRUB(small_network(), 10, forget_batch_size=0)
