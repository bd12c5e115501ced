"""What users rely on in SEP: bounds, independence of batches, equivalences of the variants, an untouched network."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import TinyColour, stacked_states
from torchlethe import models
from torchlethe.components import NetworkEnsemble
from torchlethe.functional.self_ensemble import (
    checked_target_map,
    equidistant,
    gradient_cosines,
    opposite_classes,
    pixel_step,
)
from torchlethe.models import features_and_logits, features_of
from torchlethe.updates.protection import SelfEnsembleProtector

VARIANTS = ["sep", "sep_fa", "sep_fa_vr"]


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "sep.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def data(golden):
    return {
        "image": torch.from_numpy(golden["x_u8"]),
        "label": torch.from_numpy(golden["y"]).long(),
        "index": torch.arange(40),
    }


def split(data, size):
    parts = (value.split(size) for value in data.values())
    return [dict(zip(data, part, strict=True)) for part in zip(*parts, strict=True)]


def rule_for(golden, data, **settings):
    defaults = {"radius": 4, "steps": 4, "checkpoints": 3, "inner_steps": 3}
    network = settings.pop("network", None) or TinyColour().double()
    states = settings.pop("states", None) or stacked_states(golden)
    rule = SelfEnsembleProtector(network, 10, states, **defaults | settings)
    rule.prepare(split(data, 16), device="cpu")
    return rule


def protect(rule, data, size=40):
    return torch.cat([rule.protect(**batch) for batch in split(data, size)])


def test_selection_of_checkpoints():
    assert equidistant(120, 30) == list(range(3, 120, 4))
    assert equidistant(120, 15) == list(range(7, 120, 8))
    assert equidistant(9, 1) == [8]
    for length in range(1, 14):
        for count in range(1, length + 1):
            chosen = equidistant(length, count)
            assert len(set(chosen)) == count
            assert chosen == sorted(chosen)
            assert chosen[-1] == length - 1
    with pytest.raises(ValueError, match="31 checkpoints are asked for, there are 30"):
        equidistant(30, 31)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_stay_bytes_within_the_radius(variant, golden, data):
    protected = protect(rule_for(golden, data, variant=variant, radius=3, step=2), data)
    change = (protected.int() - data["image"].int()).abs()
    assert protected.dtype is torch.uint8
    assert change.max() == 3
    extremes = data | {"image": torch.where(data["image"] > 127, 255, 0).to(torch.uint8)}
    protected = protect(rule_for(golden, extremes, variant=variant), extremes)
    assert (protected.int() - extremes["image"].int()).abs().max() <= 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_batch_size_and_division_gives_the_same_bytes(variant, golden, data):
    rule = rule_for(golden, data, variant=variant)
    together = protect(rule, data)
    assert torch.equal(protect(rule, data, 1), together)
    assert torch.equal(protect(rule, data, 7), together)
    # two ranks: each measures sums on its images, and these are added up
    shards = [{name: value[half] for name, value in data.items()} for half in (slice(20), slice(20, 40))]
    seen = [[], []]
    for shard, values in zip(shards, seen, strict=True):
        rule_for(golden, data, variant=variant).prepare(
            split(shard, 16), device="cpu", reduce=lambda value, values=values: values.append(value) or value
        )
    for rank, shard in enumerate(shards):
        sums = iter([first + second for first, second in zip(*seen, strict=True)])
        sharded = rule_for(golden, data, variant=variant)
        sharded.prepare(split(shard, 16), device="cpu", reduce=lambda _, sums=sums: next(sums))
        assert torch.equal(protect(sharded, shard), together[rank * 20 :][:20])


def test_one_inner_step_of_variance_reduction_is_feature_alignment(golden, data):
    first = protect(rule_for(golden, data, variant="sep_fa_vr", inner_steps=1), data)
    assert torch.equal(first, protect(rule_for(golden, data, variant="sep_fa"), data))


def test_with_equal_checkpoints_the_corrections_cancel(golden, data):
    states = [stacked_states(golden)[6]] * 3
    rule = rule_for(golden, data, variant="sep_fa_vr", states=states)
    clean = data["image"].to(torch.int16)
    target = rule.target[data["label"]]
    total = torch.zeros(clean.shape, dtype=torch.float64)
    x = clean
    for k in rule.draws(0):
        total += rule.gradient(k, x, target)[0]
        x = pixel_step(x, clean, total, 1, 4)
    torch.testing.assert_close(rule._direction(clean, clean, target, 0)[0], total, rtol=0, atol=1e-12)


def test_one_checkpoint_is_targeted_sign_descent_on_the_last(golden, data):
    protected = protect(rule_for(golden, data, checkpoints=1), data)
    network = TinyColour().double().eval()
    network.load_state_dict(stacked_states(golden)[-1])
    clean = data["image"].double() / 255
    x = clean.clone()
    for _ in range(4):
        x.requires_grad_(True)
        loss = nn.functional.cross_entropy(network(x), (data["label"] + 5) % 10)
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x.detach() - gradient.sign() / 255).clamp(clean - 4 / 255, clean + 4 / 255).clamp(0, 1)
    assert torch.equal(protected, (x * 255).round().to(torch.uint8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_checkpoints_see_the_wrong_class_and_notes_say_so(variant, golden, data):
    rule = rule_for(golden, data, variant=variant, steps=8)
    steps = list(rule.iterate(data["image"], data["label"]))
    rule.protect(**data)
    notes = rule.notes
    assert notes["loss"].mean() < steps[0].loss.mean()
    assert torch.equal(notes["loss_before"], steps[0].loss)
    assert notes["matches"].mean() > steps[0].matches.double().mean()
    for name in ("loss", "loss_before", "matches", "unrecognised"):
        assert notes[name].shape == (40,)
    logits = torch.stack([rule.network_ensemble(k, steps[-1].image.double() / 255)[1] for k in range(3)])
    never = (logits.argmax(-1) != data["label"]).all(0)
    assert torch.equal(notes["unrecognised"], never.double())


@pytest.mark.parametrize("variant", ["sep", "sep_fa"])
def test_predicted_labels_are_those_of_the_last_checkpoint(variant, golden, data):
    states = stacked_states(golden)
    network = TinyColour().double().eval()
    network.load_state_dict(states[-1])
    with torch.no_grad():
        seen = network(data["image"].double() / 255).argmax(-1)
    assert not torch.equal(seen, data["label"])
    blind = data | {"label": torch.full((40,), -1)}
    settings = {"variant": variant, "target": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]}
    if variant == "sep_fa":  # class 0 is never seen, so that it has no mean
        with pytest.raises(ValueError, match="class 0 has no image"):
            rule_for(golden, blind, labels="predicted", **settings)
        return
    found = protect(rule_for(golden, blind, labels="predicted", **settings), blind)
    assert torch.equal(found, protect(rule_for(golden, data, **settings), data | {"label": seen}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compiled_graph_serves_all_checkpoints(variant, golden, data, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def states():
        return [models.SmallCNN(10, 3, 8, pooled=True).double().state_dict() for _ in range(3)]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"variant": variant, "states": states(), "network": models.SmallCNN(10, 3, 8, pooled=True).double()}
    torch._dynamo.reset()
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: plain_compile(function, backend=backend, **kwargs))
    rule = rule_for(golden, data, **settings, compiled=True)
    found = protect(rule, data)
    made = len(graphs)
    assert 0 < made <= 4  # with and without gradients, for each size of batch
    assert torch.equal(protect(rule, data), found)
    assert len(graphs) == made
    assert torch.equal(found, protect(rule_for(golden, data, **settings), data))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_network_modes_and_random_state_are_left_alone(variant, compat, golden, data):
    network = TinyColour().double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    states = stacked_states(golden)
    state = torch.get_rng_state()
    rule = SelfEnsembleProtector(network, 10, states, variant, radius=4, steps=4, checkpoints=3, compat=compat)
    with torch.inference_mode():
        rule.prepare(split(data, 16), device="cpu")
        protect(rule, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for state, again in zip(states, stacked_states(golden), strict=True):
        assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_own_targets_and_refusals(golden, data):
    rule = rule_for(golden, data, target=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    assert rule._targets(torch.tensor([0, 9])).tolist() == [1, 0]
    assert opposite_classes(3).tolist() == [1, 2, 0]
    for settings, message in [
        ({"target": [0, *range(2, 10), 1]}, "maps class 0 to itself"),
        ({"target": [1, 1]}, "must name each class"),
        ({"radius": 0}, "radius is 0, it must be a whole number, 1…255"),
        ({"step": 0.5}, "step is 0.5"),
        ({"variant": "fa"}, "variant is 'fa'"),
        ({"compat": "paper"}, "compat is 'paper'"),
        ({"labels": "none"}, "labels is 'none'"),
        ({"compiled": True}, "TinyColour is no torchlethe.models.FeatureNetwork"),
        ({"checkpoints": 8}, "checkpoints is 8, the ensemble has 7"),
        ({"vectorised": True, "compiled": True}, "compiled and vectorised are both true"),
        ({"vectorised": True, "compat": "official"}, "one by one"),
    ]:
        with pytest.raises(ValueError, match=message):
            rule_for(golden, data, **settings)
    with pytest.raises(ValueError, match="with one class there is no wrong one"):
        opposite_classes(1)
    with pytest.raises(ValueError, match="a label is 12"):
        rule.protect(data["image"], torch.full((40,), 12), data["index"])
    with pytest.raises(RuntimeError, match="prepare"):
        SelfEnsembleProtector(TinyColour().double(), 10, stacked_states(golden), checkpoints=2).protect(**data)
    keep = data["label"] != 3
    with pytest.raises(ValueError, match="class 3 has no image"):
        rule_for(golden, {name: value[keep] for name, value in data.items()}, variant="sep_fa")
    with pytest.raises(ValueError, match="maps class 1 to itself"):
        checked_target_map([2, 1, 0], 3)


def test_other_settings_are_another_protection_with_the_same_class_means(golden, data):
    torch.manual_seed(0)
    first, same = (rule_for(golden, data, variant="sep_fa") for _ in range(2))
    assert first.fingerprint() == same.fingerprint()  # the weights that the network was built with are not used
    for change in ({"radius": 2}, {"steps": 3}, {"variant": "sep_fa_vr"}):
        other = rule_for(golden, data, **{"variant": "sep_fa"} | change)
        assert other.fingerprint() != first.fingerprint()
        assert other.preparation_fingerprint() == first.preparation_fingerprint()


def test_cosines_of_gradients(golden, data):
    rule = rule_for(golden, data)
    cosines = rule.cosines(data["image"], data["label"]) / 40
    assert cosines.shape == (3, 3)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(cosines, cosines.T)
    gradients = rule.gradients(data["image"].to(torch.int16), rule.target[data["label"]])[0].flatten(2)
    by_hand = torch.cosine_similarity(gradients[0], gradients[2], dim=-1).abs().mean()
    torch.testing.assert_close(cosines[0, 2], by_hand)
    assert gradient_cosines(torch.zeros(2, 1, 3)).max() == 0


@pytest.mark.parametrize("maker", ["resnet8", "vgg16_bn", "densenet121", "preact_resnet18", "resnet18", "SmallCNN"])
def test_folding_changes_no_output(maker):
    torch.manual_seed(0)
    network = models.SmallCNN(10, 3, 32) if maker == "SmallCNN" else getattr(models, maker)()
    network = models.normalized(network, "cifar10").double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = features_and_logits(network, image)
        assert torch.equal(expected[0], features_of(network, image))
        assert torch.equal(expected[1], network(image))
        ensemble = NetworkEnsemble(network, [network.state_dict()], features_and_logits)
        ensemble.fold(image)
        assert ensemble.pairs
        for found, value in zip(ensemble(0, image), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


def test_a_convolution_that_is_read_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, image):
            hidden = self.conv(image)
            return self.linear((self.bn(hidden) + hidden).mean((2, 3)))

    ensemble = NetworkEnsemble(Twice(), [Twice().state_dict()])
    ensemble.fold(torch.rand(1, 3, 8, 8))
    assert ensemble.pairs == []
