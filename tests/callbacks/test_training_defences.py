"""Other images for the training step: inside the ball, harder than before, and the same on any number of ranks."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import forgetful_digits, norm_free_network, quiet_trainer, sgd, small_network
from torchlethe.callbacks import AdversarialTraining, UEraser
from torchlethe.data import ErasingAugmentation
from torchlethe.datamodules import DigitsDataModule
from torchlethe.lightning_modules import Classifier, SFRon


class Seen(Callback):
    """What the training step got, and the state it found."""

    def __init__(self):
        self.batches, self.training = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append({name: value.clone() for name, value in batch.items()})
        self.training.append(all(part.training for part in pl_module.network.modules()))


def run(defence, steps=2, network=None, data=None):
    seen = Seen()
    module = Classifier(network or small_network(), 10, sgd())
    trainer = quiet_trainer(max_steps=steps, callbacks=[defence, seen])
    trainer.fit(module, datamodule=data or DigitsDataModule())
    return module, seen


def clean(batch):
    data = DigitsDataModule()
    data.setup()
    return data.train_set.images[batch["index"]].float() / 255


def test_adversarial_images_lie_in_the_ball_and_are_harder():
    network = small_network().eval()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    _, seen = run(AdversarialTraining(epsilon=16, step_size=4, steps=5), steps=1, network=network)
    batch, image = seen.batches[0], clean(seen.batches[0])
    assert float((batch["image"] - image).abs().max()) <= 16 / 255 + 1e-6
    assert 0 <= float(batch["image"].min()) <= float(batch["image"].max()) <= 1
    assert seen.training == [True]
    network.load_state_dict(start)
    network.eval()
    losses = [F.cross_entropy(network(x), batch["label"], reduction="none") for x in (image, batch["image"])]
    assert float((losses[1] > losses[0]).float().mean()) > 0.95


def test_the_attack_leaves_statistics_and_gradients_alone():
    """One step from the same weights: BatchNorm has seen the adversarial images once, and nothing else."""
    module, seen = run(AdversarialTraining(steps=3), steps=1)
    other = Classifier(small_network(), 10, sgd())
    optimizer = other.configure_optimizers()
    F.cross_entropy(other.network.train()(seen.batches[0]["image"]), seen.batches[0]["label"]).backward()
    optimizer.step()
    for name, value in other.network.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(
    "defence",
    [AdversarialTraining(steps=2), UEraser(samples=3, augmentation=ErasingAugmentation(trivial=False))],
    ids=["adversarial", "ueraser"],
)
def test_each_half_of_a_batch_gets_what_the_whole_gets(defence):
    """As on two ranks; a network without BatchNorm in double precision, as batches of other sizes round otherwise."""
    module = Classifier(norm_free_network().double(), 10, sgd())
    trainer = quiet_trainer(max_steps=0)
    trainer.fit(module, datamodule=DigitsDataModule())
    generator = torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(8, 1, 8, 8, generator=generator).double(), "label": torch.arange(8)}
    batch["index"] = torch.arange(8) + 100
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 3), slice(3, 8))]
    for one in (batch, *parts):
        defence.on_train_batch_start(trainer, module, one, 0)
    torch.testing.assert_close(torch.cat([part["image"] for part in parts]), batch["image"], rtol=0, atol=1e-6)
    assert batch["image"].dtype is torch.float64


def test_ueraser_takes_the_hardest_view():
    augmentation = ErasingAugmentation(trivial=False, probability=0.9)
    network = small_network()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    _, seen = run(UEraser(samples=4, augmentation=augmentation, seed=3), steps=1, network=network)
    batch, image = seen.batches[0], clean(seen.batches[0])
    network.load_state_dict(start)
    views = [augmentation(image, batch["index"], 0, 3 + number) for number in range(4)]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(network.train()(x), batch["label"], reduction="none") for x in views])
    hardest = torch.stack(views)[losses.argmax(0), torch.arange(len(image))]
    torch.testing.assert_close(batch["image"], hardest)


def test_ueraser_takes_one_view_in_the_end():
    augmentation = ErasingAugmentation(trivial=False)
    _, seen = run(UEraser(samples=4, epochs=0, augmentation=augmentation, seed=3), steps=1)
    batch = seen.batches[0]
    assert torch.equal(batch["image"], augmentation(clean(batch), batch["index"], 0, 3))


class Foreign(LightningModule):
    """Somebody else's module on (image, label) pairs."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        self.images = []

    def forward(self, image):
        return self.network(image)

    def training_step(self, batch, batch_idx):
        self.images.append(batch[0].clone())
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_with_automatic_optimization():
    image = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    module = Foreign()
    trainer = quiet_trainer(max_steps=1, callbacks=[AdversarialTraining(epsilon=8, step_size=2, steps=10)])
    trainer.fit(module, DataLoader(TensorDataset(image, torch.arange(6) % 4), batch_size=6))
    change = (module.images[0] - image).abs()
    assert float(change.max()) <= 8 / 255 + 1e-6
    assert float((change > 7 / 255).float().mean()) > 0.7  # most values reach the ball's surface


def test_a_defended_classifier_learns():
    module = Classifier(small_network(), 10, sgd(), cutmix=1.0, mixup=1.0)
    trainer = quiet_trainer(max_epochs=8, callbacks=[AdversarialTraining(epsilon=4, step_size=2, steps=2)])
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
    found = trainer.test(module, datamodule=DigitsDataModule(), verbose=False)[0]
    assert found["test_accuracy"] > 0.9


def test_refusals():
    with pytest.raises(ValueError, match="epsilon is 0, it must be above 0"):
        AdversarialTraining(epsilon=0)
    with pytest.raises(ValueError, match="samples is 0"):
        UEraser(samples=0)
    with pytest.raises(ValueError, match="cutmix is -1"):
        Classifier(small_network(), 10, cutmix=-1)
    trainer = quiet_trainer(max_steps=1, callbacks=[UEraser()])
    with pytest.raises(ValueError, match="UEraser needs automatic optimization, SFRon optimises by itself"):
        trainer.fit(SFRon(small_network(), 10, steps=1), datamodule=forgetful_digits())
