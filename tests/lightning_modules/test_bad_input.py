"""What nobody means to give a method: each gets one sentence before anything changes, or works."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import quiet_trainer
from tests.lightning_modules.methods import METHODS, CoarseImages, Plain, divided, finite, moved, plain, unlearn
from torchlethe.callbacks import NothingToForget
from torchlethe.data import ForgetClasses, ForgetFraction, ForgetIndices, InMemoryImages
from torchlethe.datamodules import UnlearningDataModule
from torchlethe.lightning_modules import Classifier, MUMis, SFRon

CLASS = ForgetClasses([2])


def untouched(module, data, sentence, **arguments):
    """A fit that ends in a sentence and leaves the network as it was."""
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        unlearn(module, data, **arguments)
    assert not moved(module.network, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (ForgetIndices([]), "source holds no indices, but must name at least one sample to forget"),
        (ForgetIndices(list(range(240))), "forget selects all 240 training samples .*but some must remain"),
        (ForgetIndices([3, 240]), "source names the index 240, but the training set has 240 samples .*0 to 239"),
    ],
    ids=["empty", "everything", "out of range"],
)
def test_impossible_forget_sets_are_refused(name, request_, sentence):
    untouched(METHODS[name](plain(), 4), divided(request_), sentence)


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_loader_is_refused(name):
    module = METHODS[name](plain(), 4)
    full = DataLoader(TensorDataset(torch.rand(24, 1, 8, 8), torch.arange(24) % 4), batch_size=8)
    empty = DataLoader(TensorDataset(torch.rand(0, 1, 8, 8), torch.arange(0)), batch_size=8)
    missing = "forget" if "forget" in module.reads else "remain"
    loaders = {role: empty if role == missing else full for role in module.reads}
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    trainer = quiet_trainer(max_epochs=1)
    with pytest.raises(ValueError, match=f"the loader of {missing} is empty, but|NatMU mixes the images of two data"):
        trainer.fit(module, loaders if len(loaders) > 1 else loaders[missing])
    assert not moved(module.network, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize("known", [True, False], ids=["head", "hidden head"])
def test_a_head_of_another_size_is_refused(name, outputs, known):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = Plain(outputs=outputs)

        def forward(self, image):
            return self.whole(image)

    network = plain(outputs) if known else Hidden()
    untouched(
        METHODS[name](network, 4), divided(CLASS), f"{outputs} outputs, num_classes is 4|logits of shape|no Linear"
    )


@pytest.mark.parametrize("name", METHODS)
def test_in_place_activations_change_nothing(name):
    networks = [plain() for _ in range(2)]
    networks[1].relu.inplace = True
    for network in networks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unlearn(METHODS[name](network, 4), divided(CLASS))
    for first, second in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


class Certain(Plain):
    """So sure of every image that the cross-entropy is exactly 0: the mean of an image tells its class."""

    def forward(self, image):
        mean = image.mean((1, 2, 3)) * 255 - 30
        steps = torch.stack([(mean - 16 * (3 * c + 1)).square() for c in range(4)], 1)
        return super().forward(image) - 1e3 * steps.detach()


@pytest.mark.parametrize("name", METHODS)
def test_losses_of_exactly_zero_leave_numbers(name):
    network = Certain()
    data = divided(ForgetFraction(0.2))
    data.setup()
    batch = data.prepare_batch(next(iter(data.role_loader("train"))))
    assert float(nn.functional.cross_entropy(network(batch["image"]), batch["label"])) == 0
    module = METHODS[name](network, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "unsir":
            data = divided(CLASS)
        unlearn(module, data)
    assert finite(module)


# --- the forget set and the test set --------------------------------------------------------------------------------


class Leaking(CoarseImages):
    """The first 30 training images are in the test set too, at other places and with other labels."""

    def load(self, split):
        found = super().load(split)
        if split == "train":
            return found
        copied = super().load("train").images[:30].flip(0)
        images = torch.cat([found.images[:100], copied])
        return InMemoryImages(images, torch.zeros(130, dtype=torch.long), classes=found.classes)


def test_forget_images_in_the_test_set_are_counted():
    for request, count in ((ForgetIndices([3, 29, 30, 100]), 2), (ForgetIndices(range(30)), 30)):
        with pytest.warns(
            UserWarning, match=f"{count} of {len(request.indices())} forget images are in the test set to"
        ):
            UnlearningDataModule(Leaking(), request).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UnlearningDataModule(Leaking(), ForgetIndices([30, 40])).setup()


# --- a network that never saw the forget set ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Networks trained on all images, and without those of the fixtures' requests."""
    found = {}
    for name, left_out in {"all": [], "class": (torch.arange(240) % 12 // 3 == 2).nonzero().flatten().tolist()}.items():
        data = CoarseImages()
        data.setup()
        keep = torch.ones(240, dtype=torch.bool)
        keep[left_out] = False
        images = data.train_set.subset(keep)
        module = Classifier(plain(), 4, lambda p: torch.optim.Adam(p, lr=0.02))
        loader = DataLoader(TensorDataset(images.images.float() / 255, images.labels), batch_size=30, shuffle=True)
        torch.manual_seed(0)
        quiet_trainer(max_epochs=30).fit(module, loader)
        found[name] = module.network
    return found


class Remembering(Plain):
    """Sure of the very training images, and of no other."""

    def __init__(self):
        super().__init__()
        found = CoarseImages().load("train")
        self.register_buffer("known", found.images.flatten(1).float() / 255)
        self.register_buffer("labels", found.labels)

    def forward(self, image):
        distance, nearest = torch.cdist(image.flatten(1), self.known).min(1)
        sure = (distance < 1e-2).float().unsqueeze(1)
        return super().forward(image) + 4 * sure * nn.functional.one_hot(self.labels[nearest], 4)


def looked(network, request, **arguments):
    """What the callback says in a short run of SFRon."""
    data = request if isinstance(request, UnlearningDataModule) else divided(request)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = SFRon(copy.deepcopy(network), 4, steps=2)
        unlearn(module, data, callbacks=[NothingToForget(**arguments)])
    return [str(w.message) for w in caught if "nothing to forget" in str(w.message)]


def test_a_class_that_was_never_learned_is_said(trained):
    (sentence,) = looked(trained["class"], CLASS)
    assert "the network knows 0.0 % of the forget images, no more than a guess among 4 classes" in sentence
    assert looked(trained["all"], CLASS) == []
    assert looked(trained["class"], CLASS, samples=0) == []


def test_samples_that_were_never_learned_are_said(trained):
    (sentence,) = looked(plain(seed=3), ForgetFraction(0.2))
    assert "no sign that it was trained on the former: either weights or forget request are the wrong ones" in sentence
    assert looked(Remembering(), ForgetFraction(0.2)) == []
    assert looked(Remembering(), ForgetIndices([7])) == []  # a single image too


def test_the_look_leaves_training_alone_and_comes_only_where_it_can(trained):
    first, second = (SFRon(copy.deepcopy(trained["all"]), 4, steps=4) for _ in range(2))
    for module, callbacks in ((first, []), (second, [NothingToForget()])):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unlearn(module, divided(CLASS), callbacks=callbacks)
    assert not moved(first.network, second.network.state_dict())
    loader = DataLoader(TensorDataset(torch.rand(24, 1, 8, 8), torch.arange(24) % 4), batch_size=8)
    trainer = quiet_trainer(callbacks=[NothingToForget()])
    trainer.fit(MUMis(plain(), 4, steps=1, min_dip=1.0), loader)
    assert trainer.global_step == 1
    with pytest.raises(ValueError, match="samples is -1, it must be at least 0"):
        NothingToForget(-1)


class WithoutTest(CoarseImages):
    """Training images only."""

    def load(self, split):
        images = super().load(split)
        return images.subset([]) if split == "test" else images


@pytest.mark.parametrize("request_", [CLASS, ForgetFraction(0.1)], ids=["class", "random"])
def test_an_empty_test_set_leaves_nothing_to_compare_with(request_):
    module = SFRon(plain(), 4, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = unlearn(module, UnlearningDataModule(WithoutTest(), request_), callbacks=[NothingToForget()])
    assert trainer.global_step == 2
    assert finite(module)
