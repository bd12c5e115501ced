"""The one-shot editors do what they say."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import Tiny, fixed_batches
from tests.helpers import assert_same_bits
from torchlethe.components.kfac import KroneckerFisher, _draw
from torchlethe.components.sample_gradients import (
    curvature_product,
    directional_derivatives,
    expected_squared_gradients,
    mean_gradient,
    regrouped,
)
from torchlethe.functional.editing import finite_percentile
from torchlethe.updates import AmnesiacUpdate, FisherForgettingUpdate, InfluenceUpdate, SSDUpdate


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().double()


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 4
    parts = {"forget": slice(0, 12), "remain": slice(12, 40), "train": slice(0, 40)}
    return {role: fixed_batches(images[part], labels[part], 8) for role, part in parts.items()}


def start(rule, network, loaders):
    rule.configure(network)
    rule.prepare(network, {role: loaders[role] for role in rule.reads})
    return rule


def edited(rule, network, loaders):
    start(rule, network, loaders).step(network, {}, 0)
    return dict(network.named_parameters())


@pytest.mark.filterwarnings("ignore:SSDUpdate chose")
def test_ssd_leaves_weights_alone_that_matter_no_more_to_the_forget_set(network, loaders):
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    rule = start(SSDUpdate(alpha=0.0, lam=1.0), network, loaders)
    ratio = {name: full / rule.forget_importance[name] for name, full in rule.full_importance.items()}
    rule.step(network, {}, 0)
    for name, parameter in network.named_parameters():
        kept = ~(ratio[name] < 1)  # 0 / 0 stays
        assert torch.equal(parameter[kept], before[name][kept])
        torch.testing.assert_close(parameter[~kept], (before[name] * ratio[name])[~kept], rtol=1e-12, atol=0)


def test_per_sample_importance_depends_on_no_order(network, loaders):
    rule = start(SSDUpdate(alpha=1.0, per_sample=True, chunk_size=3), network, loaders)
    whole = {key: torch.cat([batch[key] for batch in loaders["train"]]).flip(0) for key in ("image", "label")}
    other = start(SSDUpdate(alpha=1.0, per_sample=True), network, loaders | {"train": [whole]})
    for name, value in rule.full_importance.items():
        torch.testing.assert_close(other.full_importance[name], value, rtol=1e-10, atol=1e-15)


def test_the_loss_free_variant_needs_no_labels(network, loaders):
    rule = start(SSDUpdate(importance="output_norm"), network, loaders)
    relabelled = {r: [b | {"label": torch.zeros_like(b["label"])} for b in part] for r, part in loaders.items()}
    other = start(SSDUpdate(importance="output_norm"), network, relabelled)
    assert_same_bits(rule.forget_importance, other.forget_importance)
    batch = loaders["forget"][0]
    short = start(SSDUpdate(importance="output_norm"), network, loaders | {"forget": [batch]})
    network.eval()
    norm = network(batch["image"]).norm(dim=1).square().mean()
    gradients = torch.autograd.grad(norm, list(network.parameters()))
    for found, gradient in zip(short.forget_importance.values(), gradients, strict=True):
        torch.testing.assert_close(found, gradient.abs(), rtol=1e-12, atol=1e-15)


def test_the_adaptive_threshold_is_numpys_percentile(network, loaders):
    rule = start(SSDUpdate(alpha="adaptive"), network, loaders)
    ratios = torch.cat([(f / rule.full_importance[n]).flatten() for n, f in rule.forget_importance.items()]).numpy()
    level = 100 - np.log(1 + 100 * 12 / 40)
    assert rule.threshold == pytest.approx(np.percentile(ratios[np.isfinite(ratios)], level), rel=1e-12)
    rule.step(network, {}, 0)
    assert torch.isnan(finite_percentile(torch.tensor([float("inf")]), 50.0))


def test_little_effect_of_ssd_is_said(network, loaders):
    with pytest.warns(UserWarning, match="chose no weight to dampen; a smaller alpha"):
        edited(SSDUpdate(alpha=1e9), network, loaders)


class Softmax(nn.Module):
    """A linear classifier: its Gauss-Newton matrix is its Hessian."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(36, 4)

    def forward(self, image):
        return self.fc(image.flatten(1))


def test_conjugate_gradients_invert_the_damped_hessian(loaders):
    torch.manual_seed(0)
    network = Softmax().double()
    rule = start(InfluenceUpdate("cg", damping=0.1, iterations=200), network, loaders)
    image = torch.cat([b["image"] for b in loaders["remain"]]).flatten(1)
    label = torch.cat([b["label"] for b in loaders["remain"]])
    weights = torch.cat([network.fc.weight.detach().flatten(), network.fc.bias.detach()])

    def loss(w):
        return nn.functional.cross_entropy(image @ w[:144].view(4, 36).T + w[144:], label)

    hessian = torch.func.hessian(loss)(weights)
    target = start(InfluenceUpdate("none"), network, loaders).direction
    flat = torch.cat([t.flatten() for t in target])
    expected = torch.linalg.solve(hessian + 0.1 * torch.eye(148, dtype=torch.float64), flat)
    torch.testing.assert_close(torch.cat([d.flatten() for d in rule.direction]), expected, rtol=1e-4, atol=1e-6)
    product = torch.cat([p.flatten() for p in curvature_product(network, loaders["remain"], target)])
    torch.testing.assert_close(product, hessian @ flat, rtol=1e-10, atol=1e-12)


def sample_gradients_of(network, batches):
    """One row (P,) for each sample, by a loop."""
    rows = []
    for batch in batches:
        for image, label in zip(batch["image"], batch["label"], strict=True):
            loss = nn.functional.cross_entropy(network(image[None]), label[None])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    return torch.stack(rows)


def test_the_true_woodfisher_is_where_the_recursion_leads(network, loaders):
    damping = 0.1
    rule = start(InfluenceUpdate("true_woodfisher", damping=damping, iterations=300), network, loaders)
    target = start(InfluenceUpdate("none"), network, loaders).direction
    network.eval()
    rows = sample_gradients_of(network, loaders["remain"])
    inverse = torch.eye(rows.shape[1], dtype=torch.float64) / damping
    for g in rows:  # Sherman-Morrison, one sample after the other, as Singh and Alistarh do it
        moved = inverse @ g
        inverse -= torch.outer(moved, moved) / (len(rows) + g @ moved)
    expected = inverse @ torch.cat([t.flatten() for t in target])
    torch.testing.assert_close(torch.cat([d.flatten() for d in rule.direction]), expected, rtol=1e-5, atol=1e-8)


def test_kronecker_factors_are_the_expectations_they_stand_for(network, loaders):
    network.eval()
    fisher = KroneckerFisher(network, loaders["remain"], seed=5)
    image = torch.cat([b["image"] for b in loaders["remain"]])
    outputs = {}
    handles = [m.register_forward_hook(lambda m, i, o: outputs.__setitem__(m, (i[0], o))) for m in network.modules()]
    logits = network(image)
    [handle.remove() for handle in handles]
    drawn = torch.cat(
        [_draw(part, 8 * n + torch.arange(len(part)), 5) for n, part in enumerate(logits.detach().split(8))]
    )
    loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
    read, written = outputs[network.fc]
    (gradient,) = torch.autograd.grad(loss, written, retain_graph=True)
    a = torch.cat([read, torch.ones(len(read), 1, dtype=read.dtype)], 1)
    torch.testing.assert_close(fisher.factors["fc"][0], a.T @ a / len(a))
    torch.testing.assert_close(fisher.factors["fc"][1], gradient.T @ gradient / len(a))
    # a convolution is a linear layer on patches: its weight gradient is the sum over positions of g a^T
    read, written = outputs[network.conv2]
    (gradient,) = torch.autograd.grad(loss, written)
    patches = nn.functional.unfold(read, 3, padding=1, stride=2).transpose(1, 2)
    patches = torch.cat([patches, torch.ones(*patches.shape[:2], 1, dtype=read.dtype)], 2)
    rows, places = patches.flatten(0, 1), patches.shape[1]
    flat = gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(fisher.factors["conv2"][0], rows.T @ rows / len(image))
    torch.testing.assert_close(fisher.factors["conv2"][1], flat.T @ flat / (len(image) * places))


def test_kfac_solves_with_the_damped_kronecker_product(network, loaders):
    fisher = KroneckerFisher(network, loaders["remain"])
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in network.parameters()]
    found = dict(zip(fisher.names, fisher.solve(vector, 0.05), strict=True))
    given = dict(zip(fisher.names, vector, strict=True))
    for name, (a, g) in fisher.factors.items():
        ratio = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        damped = [f + 0.05**0.5 * r * torch.eye(len(f), dtype=f.dtype) for f, r in ((a, ratio), (g, 1 / ratio))]
        parts = [part for part in (f"{name}.weight", f"{name}.bias") if part in given]
        joined, solved = (
            torch.cat([t[part].flatten(1) if t[part].ndim > 1 else t[part][:, None] for part in parts], 1)
            for t in (given, found)
        )
        product = torch.kron(damped[1], damped[0]) @ solved.flatten()
        torch.testing.assert_close(product, joined.flatten(), rtol=1e-8, atol=1e-10)
    for name in ("bn1.weight", "bn2.bias"):
        torch.testing.assert_close(found[name], given[name] / (fisher.diagonal[name] + 0.05))


def test_drawn_labels_follow_the_predictions_and_the_sample():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    drawn = _draw(logits, torch.arange(20000), 0)
    torch.testing.assert_close(drawn.bincount() / 20000, logits[0].softmax(0), rtol=0.03, atol=0.0)
    assert torch.equal(drawn[100:200], _draw(logits[100:200], torch.arange(100, 200), 0))


def test_an_activation_in_place_does_not_change_the_factors(loaders):
    networks = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(48, 4)]
        networks.append(KroneckerFisher(nn.Sequential(*layers).double(), loaders["remain"]))
    for name, (a, g) in networks[0].factors.items():
        torch.testing.assert_close(networks[1].factors[name], (a, g))


def test_a_layer_that_reads_a_table_has_a_diagonal(loaders):
    class Biased(nn.Module):
        """As relative positions in Swin V2: a layer turns a table of places into a bias."""

        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Linear(2, 36), nn.Linear(36, 4)

        def forward(self, image):
            return self.fc(image.flatten(1) * self.table(torch.ones(1, 3, 2, dtype=image.dtype)).mean((0, 1)))

    torch.manual_seed(0)
    fisher = KroneckerFisher(Biased().double(), loaders["remain"])
    assert set(fisher.factors) == {"fc"}
    assert all(part.isfinite().all() for part in fisher.solve([v.clone() for v in fisher.diagonal.values()], 0.1))


def test_padding_counts_for_nothing(network, loaders):
    padding = {"image": torch.rand(3, 1, 6, 6, dtype=torch.float64), "label": torch.full((3,), -100)}
    batch = loaders["remain"][0]
    padded = [{key: torch.cat([batch[key], padding[key]]) for key in batch}]
    plain, size = mean_gradient(network, [batch])
    found, padded_size = mean_gradient(network, padded)
    assert size == padded_size == 8
    direction = [torch.ones_like(p) for p in network.parameters()]
    tables = [directional_derivatives(network, batches, [direction]) for batches in ([batch], padded)]
    squares = [expected_squared_gradients(network, batches) for batches in ([batch], padded)]
    torch.testing.assert_close(plain, found)
    torch.testing.assert_close(*tables)
    torch.testing.assert_close(squares[0][0], squares[1][0])
    assert squares[0][1].tolist() == squares[1][1].tolist() == [2, 2, 2, 2]


def test_regrouping_keeps_every_sample_in_order(loaders):
    parts = list(regrouped(loaders["remain"], 10))
    assert [len(part["label"]) for part in parts] == [10, 10, 8]
    for key in ("image", "label"):
        assert torch.equal(*(torch.cat([b[key] for b in batches]) for batches in (parts, loaders["remain"])))


def test_fisher_noise_is_seeded_and_forgotten_classes_start_anew(network, loaders):
    without = [{key: value[batch["label"] != 2] for key, value in batch.items()} for batch in loaders["remain"]]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    runs = []
    for seed in (0, 0, 1):
        network.load_state_dict(state)
        found = edited(FisherForgettingUpdate(alpha=1e-8, seed=seed), network, {"remain": without})
        runs.append({name: p.detach().clone() for name, p in found.items()})
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["fc.weight"], runs[2]["fc.weight"])
    assert runs[0]["fc.weight"][2].abs().max() < 0.05
    assert (runs[0]["fc.weight"] - state["fc.weight"])[[0, 1, 3]].abs().max() < 0.05
    network.load_state_dict(state)
    kept = edited(FisherForgettingUpdate(alpha=1e-8, reset_classes=False), network, {"remain": without})
    assert (kept["fc.weight"] - state["fc.weight"]).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:SSDUpdate chose")
@pytest.mark.parametrize("rule", [SSDUpdate, InfluenceUpdate, FisherForgettingUpdate], ids=lambda rule: rule.__name__)
def test_an_editor_edits_once_and_leaves_modes_and_gradients_alone(rule, network, loaders):
    rule = rule()
    assert rule.configure(network.train()) == []
    with pytest.raises(RuntimeError, match="came before configure"):
        rule.step(network, {}, 0)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    start(rule, network, loaders)
    assert not rule.state_dict()["prepared"]
    rule.step(network, {}, 0)
    assert all(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert_same_bits(buffers, dict(network.named_buffers()))
    with pytest.raises(RuntimeError, match="came after the edit"):
        rule.step(network, {}, 1)
    again = type(rule)()
    again.configure(network)
    again.load_state_dict(rule.state_dict())
    assert again.prepared


@pytest.mark.parametrize("rule", [SSDUpdate, InfluenceUpdate, FisherForgettingUpdate], ids=lambda rule: rule.__name__)
def test_an_empty_loader_is_one_sentence(rule, network):
    with pytest.raises(ValueError, match="at least one batch, the loader gave none"):
        start(rule(), network, {"forget": [], "remain": [], "train": []})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SSDUpdate(alpha=-1.0), "alpha is -1.0, it must be at least 0"),
        (lambda: SSDUpdate(alpha="auto"), "alpha is 'auto', allowed are"),
        (lambda: SSDUpdate(lam=-0.1), "lam is -0.1"),
        (lambda: SSDUpdate(importance="x"), "importance is 'x', allowed are fisher and output_norm"),
        (lambda: SSDUpdate(importance="output_norm", per_sample=True), "per_sample is true"),
        (lambda: SSDUpdate(chunk_size=0), "chunk_size is 0"),
        (
            lambda: InfluenceUpdate("lbfgs"),
            "inverse is 'lbfgs', allowed are as_coded, true_woodfisher, cg, kfac and none",
        ),
        (lambda: InfluenceUpdate(damping=0.0), "damping is 0.0, it must be above 0"),
        (lambda: InfluenceUpdate(samples=0), "samples is 0"),
        (lambda: InfluenceUpdate(batches=0), "batches is 0"),
        (lambda: FisherForgettingUpdate("new"), "variant is 'new', allowed are fisher_new and fisher"),
        (lambda: FisherForgettingUpdate(alpha=float("nan")), "alpha is nan"),
        (lambda: FisherForgettingUpdate(batch_size=0), "batch_size is 0"),
        (lambda: FisherForgettingUpdate(head_rule="x"), "head_rule is 'x'"),
        (lambda: AmnesiacUpdate("nowhere", scale=0.0), "scale is 0.0"),
    ],
)
def test_wrong_arguments_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
