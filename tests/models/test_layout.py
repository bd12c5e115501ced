"""The layout that convolutional networks get on a CPU: which ones, and that nothing but speed depends on it."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import quiet_trainer, sgd
from torchlethe.lightning_modules import Classifier
from torchlethe.models import MLP, CifarResNet, VisionTransformer, channels_last_on_cpu
from torchlethe.models.layout import wants_channels_last


class Foreign(nn.Module):
    """A network of a user's, whose code may need one layout."""

    def __init__(self):
        super().__init__()
        self.inner = CifarResNet(8, num_classes=4, width=4)

    def forward(self, image):
        return self.inner(image)


def kernels(network):
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the layout is chosen for oneDNN")
def test_convolutional_networks_of_known_code_only():
    assert wants_channels_last(CifarResNet(8, num_classes=4, width=4))
    assert not wants_channels_last(CifarResNet(8, num_classes=4, width=4).double())
    assert not wants_channels_last(Foreign())
    assert not wants_channels_last(MLP())
    assert not wants_channels_last(VisionTransformer(4, image_size=16, patch_size=8, width=8, depth=2, heads=2))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the layout is chosen for oneDNN")
def test_a_fit_has_it_and_goes_on_from_a_checkpoint_in_either_layout(tmp_path, monkeypatch):
    data = DataLoader(TensorDataset(torch.rand(16, 3, 16, 16), torch.arange(16) % 4), batch_size=8)

    def run(epochs, **arguments):
        torch.manual_seed(0)
        module, trainer = Classifier(CifarResNet(8, num_classes=4, width=4), 4, sgd()), quiet_trainer(max_epochs=epochs)
        given = list(module.parameters())
        trainer.fit(module, data, **arguments)
        assert all(a is b for a, b in zip(given, module.parameters(), strict=True))
        return module, trainer

    with monkeypatch.context() as patch:
        patch.setattr("torchlethe.lightning_modules.base.channels_last_on_cpu", lambda network: network)
        module, trainer = run(1)
        trainer.save_checkpoint(tmp_path / "old.ckpt")
        plain, _ = run(2, ckpt_path=tmp_path / "old.ckpt")
    chosen, _ = run(2, ckpt_path=tmp_path / "old.ckpt")
    assert all(k.is_contiguous() for k in kernels(plain.network))
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels(chosen.network))
    for first, second in zip(plain.parameters(), chosen.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert channels_last_on_cpu(module.network) is module.network
