"""Weights leave a run for others; layout and compilation are configuration."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger

from tests.helpers import assert_same_bits, digits, forgetful_digits, quiet_trainer, sgd, small_network
from torchlethe.callbacks import ChannelsLast, CompileNetwork, ExportWeights, UnlearningEvaluation
from torchlethe.io import file_hash, load_weights, read_state_dict, save_weights
from torchlethe.lightning_modules import Classifier, SFRon


def test_exported_weights_are_the_trained_network(tmp_path):
    module = Classifier(small_network(), 10, sgd())
    quiet_trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[ExportWeights()]).fit(module, datamodule=digits())
    assert_same_bits(load_weights(small_network(1), tmp_path / "weights.safetensors"), module.network)


def test_a_fast_dev_run_exports_nothing(tmp_path):
    trainer = quiet_trainer(fast_dev_run=True, default_root_dir=tmp_path, callbacks=[ExportWeights()])
    trainer.fit(Classifier(small_network(), 10), datamodule=digits())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_each_run_exports_into_its_own_folder(tmp_path):
    modules = []
    for seed in range(2):
        modules.append(Classifier(small_network(seed), 10, sgd()))
        logger = CSVLogger(tmp_path, name="logs")
        trainer = quiet_trainer(max_steps=1, default_root_dir=tmp_path, logger=logger, callbacks=[ExportWeights()])
        trainer.fit(modules[-1], datamodule=digits())
    for run, module in enumerate(modules):
        exported = tmp_path / "logs" / f"version_{run}" / "weights.safetensors"
        assert_same_bits(load_weights(small_network(5), exported), module.network)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("role", ["the module's own weights", "the reference of Unl", "the original of Unl"])
def test_an_export_never_replaces_what_the_run_reads(role, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_weights(small_network(1), tmp_path / "weights.safetensors")
    before = file_hash(path)
    module = Classifier(small_network(), 10, sgd())
    callbacks = [ExportWeights()]
    if "module" in role:
        module.weights_path = "weights.safetensors"
    else:
        callbacks.append(UnlearningEvaluation(**{role.split()[1]: "weights.safetensors"}))
    settings = {"default_root_dir": tmp_path, "max_steps": 1, "callbacks": callbacks}
    with pytest.raises(ValueError, match=rf"^ExportWeights would replace {role}.*'weights.safetensors'; choose .*\.$"):
        quiet_trainer(**settings).fit(module, datamodule=forgetful_digits())
    assert file_hash(path) == before


def test_a_part_that_does_not_exist_is_refused_before_training(tmp_path):
    module = Classifier(small_network(), 10, sgd())
    settings = {"default_root_dir": tmp_path, "max_steps": 1}
    with pytest.raises(ValueError, match=r"^attribute is 'netwrok', but Classifier has no such part to export; .*\.$"):
        quiet_trainer(**settings, callbacks=[ExportWeights(attribute="netwrok")]).fit(module, datamodule=digits())
    quiet_trainer(**settings, callbacks=[ExportWeights(attribute=None)]).fit(module, datamodule=digits())
    assert_same_bits(read_state_dict(tmp_path / "weights.safetensors"), module)


def test_export_refuses_another_format():
    with pytest.raises(ValueError, match=r"filename is 'a\.pt', it must end in \.safetensors"):
        ExportWeights("a.pt")


@pytest.mark.parametrize("kind", ["classifier", "sfron"])
def test_channels_last_and_compilation_change_nothing_but_the_speed(kind):
    def run(*callbacks):
        network = small_network().double()
        if kind == "classifier":
            module: LightningModule = Classifier(network, 10, sgd())
        else:
            module = SFRon(network, 10, steps=8, alpha=5.0)
        trainer = quiet_trainer(max_steps=8, max_epochs=1, precision="64-true", callbacks=list(callbacks))
        trainer.fit(module, datamodule=digits() if kind == "classifier" else forgetful_digits())
        return module.network

    # the eager backend traces the graph as any other would, and needs no C++ compiler
    plain, fast = run(), run(ChannelsLast(), CompileNetwork(backend="eager"))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    convolution = next(m for m in fast.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_what_cannot_be_compiled_says_so():
    class Bare(LightningModule):
        pass

    with pytest.raises(ValueError, match="needs a module with a 'network', Bare has none"):
        CompileNetwork().setup(quiet_trainer(), Bare(), "fit")
