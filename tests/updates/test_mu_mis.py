"""What MU-Mis promises: exact gradients, other classes, a step that scales, a guard; and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.helpers import assert_same_bits, norm_free_network, small_network
from torchlethe.functional.sensitivity import hinge_weights, input_gradient, sensitivity_gap, squared_norms
from torchlethe.updates import MUMisUpdate

pytestmark = pytest.mark.filterwarnings("ignore:nothing to forget")


def batch_of(count=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, 1, 8, 8, generator=generator).to(dtype)
    return {"image": image, "label": torch.arange(count) % 10, "index": torch.arange(count) + 50}


def ready(network, batch=None, **arguments):
    rule = MUMisUpdate(**arguments)
    rule.configure(network)
    rule.prepare(network, {"forget": [batch or batch_of()]})
    return rule


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    network, batch = norm_free_network().double(), batch_of(dtype=torch.float64)
    rule = ready(network, batch, irrelevant_sampling="fixed")

    def loss():
        terms = rule._sums(network, batch["image"], batch["label"], batch["index"], 0)[-1]
        return float(terms[0] - terms[1])

    *gradients, _ = rule._sums(network, batch["image"], batch["label"], batch["index"], 0)
    directions = [torch.randn_like(p) for p in network.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(list(network.parameters()), directions, alpha=h)
            values.append(loss())
            torch._foreach_add_(list(network.parameters()), directions, alpha=-h)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_batch_gradient_is_the_sum_of_single_ones_and_nothing_but_weights_changes():
    network, batch = small_network().double(), batch_of(dtype=torch.float64)
    network[0].eval() if isinstance(network, nn.Sequential) else network.bn1.eval()
    modes = [part.training for part in network.modules()]
    rule = ready(network, batch)
    together = rule._sums(network, batch["image"], batch["label"], batch["index"], 3)
    single = [
        rule._sums(network, *(batch[key][i : i + 1] for key in ("image", "label", "index")), 3) for i in range(12)
    ]
    for whole, *parts in zip(together, *single, strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    for k in range(6):
        rule.step(network, batch, k)
    assert_same_bits(buffers, dict(network.named_buffers()))
    assert modes == [part.training for part in network.modules()]


def test_other_classes_are_uniform_never_the_label_and_a_function_of_seed_step_and_sample():
    rule = MUMisUpdate()
    rule.num_classes = 5
    label, ids = torch.arange(4000) % 5, torch.arange(4000)
    logits = torch.zeros(4000, 5)
    drawn = torch.stack([rule._other_classes(logits, label, ids, k).squeeze(1) for k in range(3)])
    assert not (drawn == label).any()
    offsets = torch.bincount(((drawn - label) % 5).flatten(), minlength=5)[1:].double()
    expected = offsets.sum() / 4
    assert float(((offsets - expected) ** 2 / expected).sum()) < 16.3  # 99.9 % of χ² with 3 degrees of freedom
    assert (drawn[0] != drawn[1]).any()
    backwards = rule._other_classes(logits, label.flip(0), ids.flip(0), 1).squeeze(1).flip(0)
    assert torch.equal(backwards, drawn[1])
    rule.seed = 1
    assert (rule._other_classes(logits, label, ids, 1).squeeze(1) != drawn[1]).any()


def test_several_fixed_and_top_classes():
    rule = MUMisUpdate(n_irrelevant=3, irrelevant_sampling="fixed")
    rule.num_classes = 4
    label, ids = torch.arange(8) % 4, torch.arange(8)
    found = rule._other_classes(torch.zeros(8, 4), label, ids, 0)
    assert torch.equal(found, rule._other_classes(torch.zeros(8, 4), label, ids, 9))
    assert all(len({*row.tolist(), int(c)}) == 4 for row, c in zip(found, label, strict=True))
    top = MUMisUpdate(irrelevant_sampling="top")
    top.num_classes = 3
    logits = torch.tensor([[9.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    assert top._other_classes(logits, torch.tensor([0, 0]), ids[:2], 0).tolist() == [[2], [1]]
    # squared norms are summed, not the gradients before squaring
    terms = sensitivity_gap(torch.tensor([4.0]), torch.tensor([[1.0, 2.0]]))
    assert terms.tolist() == [1.0]


class Scaled(nn.Module):
    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, image):
        return self.factor * self.network(image)


def test_the_relative_step_does_not_see_a_constant_factor_on_the_logits():
    moves = []
    for factor in (1.0, 3.0):
        network, batch = norm_free_network().double(), batch_of(dtype=torch.float64)
        start = [p.detach().clone() for p in network.parameters()]
        ready(wrapped := Scaled(network, factor), batch).step(wrapped, batch, 0)
        moves.append(torch.cat([(p - q).detach().flatten() for p, q in zip(network.parameters(), start, strict=True)]))
    assert moves[0].norm() > 0
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-6, atol=1e-12)


def trained(steps=60):
    """A network that has memorised a batch."""
    network, batch = small_network(), batch_of(40)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
    return network, batch


def test_a_collapse_is_taken_back():
    network, batch = trained()
    rule = ready(network, batch, rho=1.0, min_dip=1.0)
    start = [p.detach().clone() for p in network.parameters()]
    for k in range(40):
        rule.step(network, batch, k)
        if rule.stopped:
            break
    assert rule.stop_reason == "guard"
    assert all(p.isfinite().all() for p in network.parameters())
    assert rule._look(network)[0] / rule.start[0] <= rule.guard
    done = [p.detach().clone() for p in network.parameters()]
    assert rule.step(network, batch, k + 1) == {}
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), done, strict=True))
    assert len(start) == len(done)
    with pytest.warns(UserWarning, match=r"rose past 1\.25 times that at the start"):
        rule.finish(network)


def test_hinge_weights_are_one_until_the_goal_is_reached():
    weights = hinge_weights(
        torch.tensor([4.0, 1.0]), torch.tensor([[1.0], [4.0]]), torch.ones(2), torch.ones(2, 1) * 1.5
    )
    assert [w.flatten().tolist() for w in weights] == [[1.0, 0.0], [1.0, 0.0]]


def test_a_last_look_comes_with_the_end_of_the_run():
    network, batch = trained()
    rule = ready(network, batch, rho=1.0, monitor_every=1000)
    for k in range(40):
        rule.step(network, batch, k)
    assert not rule.stopped
    with pytest.warns(UserWarning, match="rose past"):
        rule.finish(network)
    assert rule.stop_reason == "guard"


def test_the_state_survives_a_round_trip():
    network, batch = trained()
    arguments = {"weighting": "hinge", "monitor_every": 3, "delta": 1.1}
    rule = ready(network, batch, **arguments)
    for k in range(4):
        rule.step(network, batch, k)
    state = copy.deepcopy({"rule": rule.state_dict(), "optimizer": rule.optimizers[0].state_dict()})
    other_network = copy.deepcopy(network)
    other = MUMisUpdate(**arguments)
    other.configure(other_network)
    other.load_state_dict(state["rule"])
    other.optimizers[0].load_state_dict(state["optimizer"])
    assert not other.prepared
    assert other.prepare(other_network, {"forget": [batch]}) == {}
    for k in range(4, 10):
        first, second = rule.step(network, batch, k), other.step(other_network, batch, k)
        assert first.get("mis/ratio") == second.get("mis/ratio")
    assert_same_bits(network, other_network)


class Attention(nn.Module):
    """Fused attention between rows of an image."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(64, 10)

    def forward(self, image):
        q, k, v = self.qkv(image).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).flatten(1))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class OnlyOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, image):
        return self.last(Once.apply(self.first(image.flatten(1))))


def test_fused_attention_works_and_what_cannot_be_differentiated_twice_is_one_sentence():
    network = Attention()
    rule = ready(network)
    before = network.qkv.weight.detach().clone()
    rule.step(network, batch_of(), 0)
    assert not torch.equal(network.qkv.weight, before)
    with pytest.raises(
        ValueError, match="MU-Mis differentiates twice, which an operation of OnlyOnce does not"
    ) as caught:
        ready(OnlyOnce())
    assert "\n" not in str(caught.value)


def test_a_compiled_network_runs_as_written():
    network, compiled = small_network(), small_network()
    compiled.compile(backend="aot_eager")
    for net in (network, compiled):
        ready(net).step(net, batch_of(), 0)
    assert_same_bits(network, compiled)


def test_channels_last_gives_the_same_step():
    network, other = small_network().double(), small_network().double().to(memory_format=torch.channels_last)
    for net in (network, other):
        ready(net, batch_of(dtype=torch.float64)).step(net, batch_of(dtype=torch.float64), 0)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_classes_and_tuples_without_index_work():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = batch_of()
    pair = (batch["image"], batch["label"] % 2)
    rule = ready(network, pair)
    assert rule.period == 1
    assert torch.isfinite(rule.step(network, pair, 0)["forget_loss"])


def test_a_network_that_never_saw_the_forget_set_is_said():
    def tilted(own):
        """A network whose true logit is the least, or the most, sensitive of all."""
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            network[1].weight.fill_(1.0)[0] = own
        return network

    batch = batch_of() | {"label": torch.zeros(12, dtype=torch.long)}
    rule = MUMisUpdate()
    network = tilted(0.5)
    rule.configure(network)
    with pytest.warns(UserWarning, match="nothing to forget"):
        rule.prepare(network, {"forget": [batch]})


def test_input_gradients_are_per_sample():
    weight = torch.arange(6.0).view(2, 3)
    image = torch.rand(2, 3, requires_grad=True)
    gradient = input_gradient(image @ weight.T, image, torch.tensor([0, 1]))
    assert torch.equal(gradient, weight)
    assert squared_norms(gradient).tolist() == [5.0, 50.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps is 0, it must be at least 1"),
        ({"monitor_every": 0}, "monitor_every is 0"),
        ({"monitor_samples": 0}, "monitor_samples is 0"),
        ({"n_irrelevant": 0}, "n_irrelevant is 0"),
        ({"rho": 0.0}, "rho is 0.0, it must be above 0"),
        ({"delta": -1.0}, "delta is -1.0"),
        ({"kappa": math.nan}, "kappa is nan"),
        ({"min_dip": 1.5}, r"min_dip is 1.5, it must lie in \[0, 1\]"),
        ({"guard": 1.0}, "guard is 1.0, it must be above 1"),
        ({"weighting": "x"}, "weighting is 'x', allowed are plain and hinge"),
        ({"irrelevant_sampling": "x"}, "irrelevant_sampling is 'x'"),
        ({"bn_mode": "x"}, "bn_mode is 'x', allowed are eval and train"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MUMisUpdate(**arguments)


def test_what_cannot_work_is_refused_before_the_first_step():
    batch = batch_of()
    with pytest.raises(ValueError, match="the weights are bfloat16, MU-Mis needs float32 or float64"):
        MUMisUpdate().configure(small_network().bfloat16())
    with pytest.raises(ValueError, match="the optimizer is Adam: give rho=None"):
        MUMisUpdate(optimizer=lambda p: torch.optim.Adam(p)).configure(small_network())
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        MUMisUpdate().configure(small_network().requires_grad_(False))
    with pytest.raises(RuntimeError, match=r"came before configure\(network\) and prepare"):
        MUMisUpdate().step(small_network(), batch, 0)
    with pytest.raises(ValueError, match="n_irrelevant is 10, there are 9 other classes"):
        ready(small_network(), n_irrelevant=10)
    with pytest.raises(ValueError, match="must have an index"):
        ready(small_network(), (batch["image"], batch["label"]), weighting="hinge")
    with pytest.raises(ValueError, match="one class a sample"):
        ready(small_network(), {"image": batch["image"], "label": batch["label"].view(-1, 1)})
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    with pytest.raises(ValueError, match="both must be positive and finite"):
        ready(constant)
