"""The units that SFRon is made of keep their promises, apart from the golden runs."""

import math

import pytest
import torch
from torch import nn

from tests.golden_networks import Tiny
from tests.helpers import assert_same_bits
from torchlethe.components import AdaptiveForgetLoss, DiagonalFisher, FastSlowUpdater, SaliencyMask
from torchlethe.functional.forgetting import forget_schedule


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().double()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(20, 1, 6, 6, dtype=torch.float64, generator=generator), torch.arange(20) % 4


def batches(data, size):
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


class TestAdaptiveForgetLoss:
    def test_weights_sum_to_one_fall_with_the_loss_and_follow_a_permutation(self):
        losses = torch.rand(32, dtype=torch.float64) * 5
        weights = AdaptiveForgetLoss(0.5).weights(losses)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
        assert (weights[losses.argsort()].diff() <= 0).all()
        order = torch.randperm(32)
        torch.testing.assert_close(AdaptiveForgetLoss(0.5).weights(losses[order]), weights[order])

    def test_lam_zero_is_the_plain_mean(self):
        losses = torch.rand(8, dtype=torch.float64)
        torch.testing.assert_close(AdaptiveForgetLoss(0.0)(losses), losses.mean())

    def test_the_gradient_flows_through_the_losses_only(self):
        losses = torch.rand(8, dtype=torch.float64, requires_grad=True)
        loss = AdaptiveForgetLoss(0.7)
        loss(losses).backward()
        torch.testing.assert_close(losses.grad, loss.weights(losses))

    @pytest.mark.parametrize(("arguments", "name"), [({"lam": 1.5}, "lam"), ({"floor": -1.0}, "floor")])
    def test_out_of_range(self, arguments, name):
        with pytest.raises(ValueError, match=f"^{name} is"):
            AdaptiveForgetLoss(**arguments)


class TestDiagonalFisher:
    def test_per_sample_does_not_depend_on_batches_or_order_and_matches_a_loop(self, network, data):
        fisher = DiagonalFisher("sample", chunk_size=3)
        first = fisher.estimate(network, batches(data, 7))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
        second = fisher.estimate(network, batches((data[0][order], data[1][order]), 5))
        network.eval()
        loop = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
        for image, label in zip(*data, strict=True):
            network.zero_grad()
            nn.functional.cross_entropy(network(image[None]), label[None]).backward()
            for name, p in network.named_parameters():
                loop[name] += p.grad**2 / 20
        for name in loop:
            torch.testing.assert_close(first[name], second[name], rtol=1e-10, atol=1e-16)
            torch.testing.assert_close(first[name], loop[name], rtol=1e-10, atol=1e-16)

    @pytest.mark.parametrize("mode", ["batch", "sample"])
    def test_padding_does_not_count(self, network, data, mode):
        padded = (torch.cat([data[0], data[0][:4]]), torch.cat([data[1], torch.full((4,), -100)]))
        plain = DiagonalFisher(mode).estimate(network, [data])
        with_padding = DiagonalFisher(mode).estimate(network, [padded])
        for name in plain:
            torch.testing.assert_close(plain[name], with_padding[name], rtol=1e-12, atol=1e-18)

    def test_leaves_the_network_as_it_was(self, network, data):
        network.train()
        network.bn1.eval()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        DiagonalFisher("batch").estimate(network, batches(data, 8))
        assert_same_bits(before, network)
        assert network.training
        assert not network.bn1.training
        assert all(p.grad is None for p in network.parameters())

    def test_works_in_inference_mode_and_sums_in_float32(self, network, data):
        plain = DiagonalFisher().estimate(network, [data])
        with torch.inference_mode():
            inside = DiagonalFisher().estimate(network, [tuple(value.clone() for value in data)])
        assert_same_bits(plain, inside)
        half = Tiny().bfloat16()
        half.load_state_dict(network.state_dict())
        many = [(data[0].bfloat16(), data[1])] * 300
        few = DiagonalFisher().estimate(half, many[:1])
        assert few["fc.weight"].dtype == torch.float32
        torch.testing.assert_close(DiagonalFisher().estimate(half, many)["fc.weight"], few["fc.weight"])

    def test_no_batches(self, network):
        with pytest.raises(ValueError, match="at least one batch"):
            DiagonalFisher().estimate(network, [])


class TestSaliencyMask:
    def test_gamma_zero_keeps_everything_and_infinity_nothing(self):
        forget, remain = {"w": torch.rand(50)}, {"w": torch.rand(50)}
        assert SaliencyMask.from_ratio(forget, remain, 0.0).kept_fraction() == 1
        assert SaliencyMask.from_ratio(forget, remain, math.inf).kept_fraction() == 0
        with pytest.raises(ValueError, match="gamma is -1"):
            SaliencyMask.from_ratio(forget, remain, -1)

    def test_the_top_fraction_is_exact_despite_ties(self):
        scores = {"a": torch.ones(7, 3), "b": torch.cat([torch.zeros(5), torch.full((4,), 2.0)])}
        mask = SaliencyMask.from_top_fraction(scores, 0.5)
        assert sum(int(m.sum()) for m in mask.masks.values()) == 15
        assert mask.masks["b"][5:].all()

    @pytest.mark.parametrize("size", [1, 8, 13])
    def test_the_saved_form_is_one_bit_a_weight_and_exact(self, size):
        masks = {"a": torch.rand(size, 3, dtype=torch.float64).round(), "b": torch.rand(size).double().round()}
        mask = SaliencyMask(masks)
        state = mask.state_dict()
        assert state["bits"].numel() == -(-4 * size // 8)
        restored = SaliencyMask.from_state_dict(state)
        assert_same_bits(mask.masks, restored.masks)

    def test_a_mask_that_does_not_fit_is_named(self, network):
        with pytest.raises(ValueError, match=r"no entry for the parameter 'conv1.weight'"):
            SaliencyMask({"fc.weight": torch.ones(4, 6)}).like(dict(network.named_parameters()))

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_held_weights_and_their_momentum_do_not_move(self, optimizer):
        weight = nn.Parameter(torch.rand(6))
        start = weight.detach().clone()
        kwargs = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        steps = optimizer([weight], lr=0.1, weight_decay=0.1, **kwargs)
        mask = SaliencyMask({"w": torch.tensor([1.0, 0, 1, 0, 1, 0])})
        for _ in range(3):
            weight.grad = torch.rand(6) * mask.masks["w"]
            with mask.held({"w": weight}, steps):
                steps.step()
        assert torch.equal(weight[1::2], start[1::2])
        assert (weight[::2] != start[::2]).all()
        buffer = steps.state[weight]["momentum_buffer" if kwargs else "exp_avg"]
        assert not buffer[1::2].any()
        assert buffer[::2].all()


class TestFastSlowUpdater:
    def test_beta_one_copies_nothing_and_beta_zero_stays(self):
        weights = [torch.rand(3), torch.rand(2, 2)]
        assert FastSlowUpdater(weights, 1.0).previous == []
        slow = FastSlowUpdater(weights, 0.0)
        start = [w.clone() for w in weights]
        for weight in weights:
            weight += 1
        slow.pull()
        assert all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))

    def test_a_cycle_filters_the_forgetting_direction_by_curvature(self):
        """On a quadratic the displacement after T repair steps is -b (I - eta H)^T u."""
        torch.manual_seed(3)
        root = torch.randn(5, 5, dtype=torch.float64)
        hessian = root @ root.T / 5
        weight = torch.zeros(5, dtype=torch.float64)
        direction, b, rate, steps, beta = torch.randn(5, dtype=torch.float64), 0.3, 0.1, 7, 0.6
        slow = FastSlowUpdater([weight], beta)
        weight -= b * direction
        for _ in range(steps):
            weight -= rate * (hessian @ weight)
        slow.pull()
        damped = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - rate * hessian, steps)
        torch.testing.assert_close(weight, -beta * b * damped @ direction, rtol=0, atol=1e-12)

    def test_out_of_range(self):
        with pytest.raises(ValueError, match=r"beta is 1\.2"):
            FastSlowUpdater([], 1.2)


def test_schedules_end_where_they_should():
    for name in ("cosine", "linear", "expdecay"):
        assert forget_schedule(name, 0.0) == 1
        assert forget_schedule(name, 1.0) == pytest.approx(0, abs=1e-12)
    assert forget_schedule("expdecay", 0.5) == 0.25
    with pytest.raises(ValueError, match="schedule is 'step'"):
        forget_schedule("step", 0.5)
