"""A network trained on digits that SEP protects is bad on clean digits; random noise of the same size does nothing."""

import torch

from tests.helpers import cosine, digits, quiet_trainer, sgd
from torchlethe.callbacks import CheckpointEnsemble
from torchlethe.data import InMemoryImages
from torchlethe.lightning_modules import Classifier, SelfEnsembleProtection
from torchlethe.models import SmallCNN

EPOCHS = 30


def trained(data, seed, callbacks=()):
    """Test accuracy of the recipe of configs/digits/ensemble.yaml."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Classifier(SmallCNN(pooled=True), 10, sgd(0.1), cosine(EPOCHS))
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]


def digits_with(images):
    data = digits(label_noise=None, eval_batch_size=600)
    data.setup()
    if images is not None:
        data.train_set = InMemoryImages(images, data.train_set.labels)
    return data


def test_sep_protects_and_random_noise_does_not(tmp_path):
    clean = digits_with(None)
    assert trained(clean, 0, [CheckpointEnsemble(tmp_path)]) > 0.95
    module = SelfEnsembleProtection(
        SmallCNN(pooled=True), 10, tmp_path, radius=32, step=4, steps=15, checkpoints=5, cache=False
    )
    parts = quiet_trainer().predict(module, clean.eval_loader(clean.train_set))
    assert trained(digits_with(torch.cat([part["image"] for part in parts])), 1) <= 0.75
    images = clean.train_set.read(clean.train_set.rows)
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 64 - 32
    assert trained(digits_with((images.int() + signs).clamp(0, 255).to(torch.uint8)), 1) >= 0.95
