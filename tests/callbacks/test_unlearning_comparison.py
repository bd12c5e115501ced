"""Beside Retrain: agreement, classes, distances of weights and relearning time in the evaluation of a run."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.test_unlearning_evaluation import (
    CLASSES,
    SIZES,
    Loaders,
    Somebodys,
    fit,
    outputs,
    read,
    train_loader,
    with_split,
)
from tests.helpers import assert_same_bits, quiet_trainer
from torchlethe.callbacks.unlearning_evaluation import UnlearningEvaluation
from torchlethe.functional import class_accuracy, total_distance
from torchlethe.metrics import define_metric
from torchlethe.metrics.relearning import RelearningSettings

NEW = (
    *(f"{kind}_{name}" for kind in ("agreement", "correctness_agreement") for name in SIZES),
    *(f"{kind}_{name}" for kind in ("class_drop", "worst_class_drop") for name in ("test", "remain")),
    *("confidence_correlation", "over_forgetting", "parameter_distance", "parameter_distance_relative"),
    "tug_of_war_mia",
)


def saved(folder, module):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(module.network.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture
def trained(tmp_path):
    """A module that knows the forget set, and its weights."""
    module = Somebodys(seed=3)
    loader = DataLoader(TensorDataset(*Loaders().data["forget"]), 8)
    quiet_trainer(max_epochs=60, default_root_dir=tmp_path).fit(module, loader)
    return module, saved(tmp_path / "original", module)


def test_a_run_beside_retrain(tmp_path):
    reference = Somebodys(seed=7)
    callback = UnlearningEvaluation(saved(tmp_path / "retrain", reference), loaders=Loaders())
    _, module = fit(tmp_path / "run", callback, Somebodys(seed=1))
    metrics, arrays = read(tmp_path / "run")
    for name in NEW:
        assert np.isfinite(metrics[name]), name
        assert define_metric(name).definition.endswith(".")
    for name in SIZES:
        ours, theirs = outputs(module.network, name), outputs(reference.network, name)
        agree = ours.logits.argmax(1) == theirs.logits.argmax(1)
        assert metrics[f"agreement_{name}"] == pytest.approx(100 * agree.double().mean().item())
        assert arrays[f"prediction_{name}"].dtype == np.uint8
        assert arrays[f"prediction_{name}"].tolist() == ours.logits.argmax(1).tolist()
        assert arrays[f"prediction_{name}_reference"].tolist() == theirs.logits.argmax(1).tolist()
        assert arrays[f"label_{name}"].tolist() == ours.labels.tolist()
        listed = [np.nan if v is None else v for v in metrics["per_class"]["accuracy"][name]]
        np.testing.assert_allclose(listed, class_accuracy(ours.logits, ours.labels))
        assert sum(metrics["per_class"]["counts"][name]) == SIZES[name]
        assert len(metrics["per_class"]["reference"][name]) == CLASSES
    np.testing.assert_allclose(arrays["logits_forget"], outputs(module.network, "forget").logits, atol=1e-6)
    both = (dict(model.network.named_parameters()) for model in (module, reference))
    assert metrics["parameter_distance"] == pytest.approx(total_distance(*both)[0])
    assert set(metrics["layers"]) == {name for name, _ in module.network.named_parameters()}
    assert "original" in metrics["per_class"]


def test_a_model_agrees_with_itself_and_has_lost_nothing(tmp_path):
    class Still(Somebodys):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.eval().network(batch[0]), batch[1])

    module = Still(seed=7)
    fit(tmp_path, UnlearningEvaluation(saved(tmp_path / "same", module), loaders=Loaders()), module)
    metrics, _ = read(tmp_path)
    for name in SIZES:
        assert metrics[f"agreement_{name}"] == metrics[f"correctness_agreement_{name}"] == 100
    assert metrics["confidence_correlation"] == pytest.approx(1.0, abs=1e-9)
    zero = [name for name in NEW if "drop" in name or "distance" in name or name == "over_forgetting"]
    assert len(zero) == 7
    assert all(metrics[name] == 0 for name in zero)
    assert metrics["tug_of_war_mia"] == 1


def test_a_known_reference_gives_the_same_numbers_as_passes_through_it(tmp_path):
    retrain = quiet_trainer(default_root_dir=tmp_path / "a", max_epochs=1, callbacks=[UnlearningEvaluation()])
    with_split(retrain, "abc")
    weights = saved(tmp_path / "a", retrain.lightning_module)
    found = []
    for kind in ("known", "older", "alone"):
        if kind == "older":  # of a version that kept neither predictions nor classes
            content, arrays = read(tmp_path / "a")
            del content["per_class"]
            (tmp_path / "a" / "evaluation.json").write_text(json.dumps(content))
            np.savez(tmp_path / "a" / "evaluation.npz", **{k: v for k, v in arrays.items() if "prediction" not in k})
        if kind == "alone":
            (tmp_path / "a" / "evaluation.json").unlink()
        callback = UnlearningEvaluation(weights, before=False)
        trainer = quiet_trainer(default_root_dir=tmp_path / kind, max_epochs=2, callbacks=[callback])
        torch.manual_seed(0)
        with_split(trainer, "abc")
        sets = 2 * sum(SIZES.values()) if kind != "known" else sum(SIZES.values()) + SIZES["forget"]
        assert trainer.lightning_module.forwards == sets
        found.append(read(tmp_path / kind)[0])
    for other in found[1:]:
        for name in NEW:
            assert other[name] == pytest.approx(found[0][name], abs=1e-9), name
        assert other["per_class"]["reference"] == found[0]["per_class"]["reference"]


def test_relearning_time(tmp_path, trained):
    module, original = trained
    state = {name: value.clone() for name, value in module.network.state_dict().items()}
    settings = RelearningSettings(lr=0.1, max_steps=300, batch_size=8)
    judged = UnlearningEvaluation(original=original, loaders=Loaders(), relearning=settings, stages=["test"])
    quiet_trainer(default_root_dir=tmp_path / "o", callbacks=[judged]).test(module, Loaders()["test"], verbose=False)
    metrics, _ = read(tmp_path / "o")
    assert metrics["relearning_steps"] == 0  # the original itself
    assert_same_bits(module.network.state_dict(), state)
    assert all(parameter.grad is None for parameter in module.parameters())

    retrain = saved(tmp_path / "retrain", Somebodys(seed=8))
    callback = UnlearningEvaluation(retrain, original, loaders=Loaders(), relearning=settings, stages=["test"])
    forgetful = Somebodys(seed=5)
    forgetful.network.requires_grad_(False)  # what the method froze relearns too
    tester = quiet_trainer(default_root_dir=tmp_path / "r", callbacks=[callback])
    tester.test(forgetful, Loaders()["test"], verbose=False)
    metrics, _ = read(tmp_path / "r")
    assert metrics["relearning_steps"] > 0
    assert metrics["relearning_ratio"] == metrics["relearning_steps"] / metrics["reference_relearning_steps"]
    record = metrics["meta"]["relearning"]
    assert record["curve"][-1] >= record["target"] - 1e-9 > record["curve"][-2]
    assert len(record["curve"]) == metrics["relearning_steps"] + 1
    assert record["settings"]["lr"] == 0.1
    assert not any(parameter.requires_grad for parameter in forgetful.parameters())
    assert forgetful.network[2].running_mean.abs().sum() == 0


def test_the_retrain_run_is_asked_for_its_relearning_time_first(tmp_path, monkeypatch):
    calls = []
    import torchlethe.callbacks.relearning_passes as passes

    def counted(*arguments, **settings):
        calls.append(settings.get("weights"))
        return passes.Relearning(len(calls), True, (0.0, 100.0))

    original = saved(tmp_path / "original", Somebodys(seed=3))
    monkeypatch.setattr(passes, "relearning_time", counted)
    monkeypatch.setattr(passes, "forget_level", lambda *_: 50.0)
    retrain = UnlearningEvaluation(original=original, relearning={"lr": 0.5})
    trainer = quiet_trainer(default_root_dir=tmp_path / "a", max_epochs=1, callbacks=[retrain])
    with_split(trainer, "abc")
    weights = saved(tmp_path / "a", trainer.lightning_module)
    steps = []
    for number, lr in enumerate((0.5, 0.4)):
        callback = UnlearningEvaluation(weights, original, relearning={"lr": lr})
        trainer = quiet_trainer(default_root_dir=tmp_path / str(number), max_epochs=1, callbacks=[callback])
        with_split(trainer, "abc")
        steps.append(read(tmp_path / str(number))[0]["reference_relearning_steps"])
    assert calls == [None, None, None, weights]  # measured anew only where the settings differ
    assert steps == [1.0, 4.0]


def test_a_run_from_random_weights_is_not_its_own_original(tmp_path, trained):
    module, _ = trained

    class Learns(Somebodys):
        def __init__(self):
            super().__init__()
            self.network[5].bias.data = torch.tensor([0.0, 0.0, 0.0, 1e3])  # one class for everything

        def on_train_epoch_end(self):
            self.network.load_state_dict(module.network.state_dict())

    callback = UnlearningEvaluation(loaders=Loaders(), relearning=RelearningSettings(), membership=[])
    with pytest.warns(UserWarning, match="they are not the original; give original"):
        fit(tmp_path / "run", callback, Learns())
    assert "relearning_steps" not in read(tmp_path / "run")[0]


def test_a_stopped_relearning_has_no_ratio(tmp_path, trained):
    _, original = trained
    retrain = saved(tmp_path / "retrain", Somebodys(seed=8))
    settings = RelearningSettings(lr=1e-9, max_steps=3)
    callback = UnlearningEvaluation(retrain, original, loaders=Loaders(), relearning=settings, stages=["test"])
    trainer = quiet_trainer(default_root_dir=tmp_path / "r", callbacks=[callback])
    trainer.test(Somebodys(seed=5), Loaders()["test"], verbose=False)
    metrics, _ = read(tmp_path / "r")
    assert metrics["relearning_steps"] == metrics["reference_relearning_steps"] == 3
    assert metrics["relearning_ratio"] is None
    assert not metrics["meta"]["relearning"]["reached"]


def test_a_diverged_run_is_valid_json(tmp_path, trained):
    _, original = trained
    callback = UnlearningEvaluation(original, original, loaders=Loaders(), relearning={"max_steps": 2})
    fit(tmp_path, callback, Somebodys(lr=1e30))
    metrics, _ = read(tmp_path)
    assert metrics["agreement_forget"] is None
    assert metrics["confidence_correlation"] is None
    assert metrics["relearning_steps"] == 2
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()


@pytest.mark.parametrize("stage", ["test", "fit"])
def test_relearning_needs_the_original(tmp_path, stage):
    callback = UnlearningEvaluation(loaders=Loaders(), relearning={}, before=False)
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=1)
    run = trainer.test if stage == "test" else trainer.fit
    with pytest.raises(ValueError, match="give original, the weights before unlearning") as caught:
        run(Somebodys(), train_loader())
    assert "\n" not in str(caught.value)


def test_relearning_needs_a_network(tmp_path):
    callback = UnlearningEvaluation(loaders=Loaders(), relearning={}, attribute="head")
    with pytest.raises(ValueError, match="relearning needs a module with a 'head'"):
        fit(tmp_path, callback)
