import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from torchlethe.functional import MeanLoss, hessian_top_eigenvalues, hessian_trace, m_sharpness, top_eigenvalues
from torchlethe.functional.group_sharpness import climb, groups_of

SAMPLES, CLASSES = 37, 3


def mlp(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, CLASSES)
        layers[1].running_mean.uniform_(-0.2, 0.2)
    return nn.Sequential(*layers).to(dtype)


def samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(SAMPLES, 5, generator=generator, dtype=dtype)
    return image, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def split(size, pair=None):
    image, label = pair or samples()
    return list(zip(image.split(size), label.split(size), strict=True))


@pytest.fixture(scope="module")
def hessian():
    network = mlp().eval()
    image, label = samples()
    shapes = {name: value.shape for name, value in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def mean_loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return cross_entropy(torch.func.functional_call(network, {**values, **buffers}, (image,)), label)

    weights = torch.cat([value.detach().flatten() for value in network.parameters()])
    return torch.func.hessian(mean_loss)(weights)


def test_products_are_those_of_the_full_hessian_whatever_the_batches(hessian):
    vectors = torch.randn(4, len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for size in (SAMPLES, 10, 1):
        found = MeanLoss(mlp(), split(size)).hessian_product(vectors)
        torch.testing.assert_close(found, vectors @ hessian, rtol=0, atol=1e-12)
    torch.testing.assert_close(MeanLoss(mlp(), split(8)).hessian_product(vectors[0]), hessian @ vectors[0])


def test_top_eigenvalues_are_those_of_the_full_hessian(hessian):
    expected = torch.linalg.eigvalsh(hessian).flip(0)
    found = hessian_top_eigenvalues(mlp(), split(10), k=4, tolerance=1e-5)
    assert found.converged
    torch.testing.assert_close(found.values, expected[:4], rtol=1e-6, atol=0)
    one = hessian_top_eigenvalues(mlp(), split(10))
    assert one.values.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert one.sweeps < len(hessian) / 2
    single = hessian_top_eigenvalues(mlp(torch.float32), split(10, (samples()[0].float(), samples()[1])))
    assert single.values.item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_trace_is_within_its_standard_error_and_repeatable(hessian):
    network = mlp()
    value, error = hessian_trace(network, split(10), probes=400)
    assert abs(value - hessian.trace()) < 3 * error
    # zᵀHz has the variance 2·Σ_{i≠j} H_ij²
    variance = 2 * (hessian.square().sum() - hessian.diagonal().square().sum())
    assert error.item() == pytest.approx((variance / 400).sqrt().item(), rel=0.2)
    again = hessian_trace(network, split(37), probes=400, together=3)
    torch.testing.assert_close(again.value, value, rtol=1e-10, atol=0)
    assert hessian_trace(network, split(10), probes=400, seed=1).value != value
    assert hessian_trace(network, split(10), probes=1).standard_error.isnan()


def symmetric(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T


@pytest.mark.parametrize(
    "values",
    [
        [5.0, 1.0, 0.5, 0.1],
        [-9.0, -7.0, -2.0, 1.0, 0.25],  # power iteration would find −9
        [-4.0, -3.0, -2.0],
        [2.0, 2.0, 2.0, 1.0],
        [0.0, 0.0, 0.0],
        [3.0],
        list(torch.linspace(-10, 10, 300).tolist()),  # hardly a gap at the top: several restarts
    ],
)
def test_known_spectra(values):
    matrix = symmetric(values)
    found = top_eigenvalues(lambda v: matrix @ v, len(values), like=matrix, tolerance=1e-6, max_sweeps=400)
    assert found.converged
    assert found.values.item() == pytest.approx(max(values), abs=1e-8)


def test_several_eigenvalues_of_a_quadratic_loss():
    """L(w) = mean of (x·w)² has the Hessian 2·XᵀX/N."""
    curvatures = [8.0, 3.0, 1.0, 0.5, 0.25, 0.0]
    network = nn.Linear(6, 1, bias=False).double()
    images = symmetric([(3 * c) ** 0.5 for c in curvatures])  # 6 rows: 2·XᵀX/6 has these eigenvalues
    batches = split(4, (images, torch.zeros(6, 1, dtype=torch.float64)))
    found = hessian_top_eigenvalues(network, batches, k=6, loss=mse_loss, tolerance=1e-8)
    torch.testing.assert_close(found.values, torch.tensor(curvatures, dtype=torch.float64), rtol=0, atol=1e-9)
    value = hessian_trace(network, batches, probes=3, loss=mse_loss, together=2)
    assert abs(value.value - sum(curvatures)) < 4 * value.standard_error + 1e-9


def test_a_maximum_has_a_negative_top_eigenvalue():
    network = nn.Linear(3, 1, bias=False).double()
    batches = split(2, (torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)))
    found = hessian_top_eigenvalues(network, batches, loss=lambda output, target: -mse_loss(output, target))
    assert found.values.item() == pytest.approx(-2 / 3)


def test_too_few_sweeps_are_told():
    matrix = symmetric(torch.linspace(-10, 10, 300).tolist())
    found = top_eigenvalues(lambda v: matrix @ v, 300, like=matrix, max_sweeps=5)
    assert not found.converged
    assert found.sweeps == 5
    assert (10 - found.values).abs() > 1e-2
    assert torch.linalg.eigvalsh(matrix).sub(found.values).abs().min() <= found.residuals.item()


def directly(m, rho, adaptive=None, eta=0.01):
    """m-sharpness by copies of the network, without this package."""
    total = 0.0
    for image, label in split(m):
        network = mlp().eval()
        loss = cross_entropy(network(image), label)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        moved = copy.deepcopy(network)
        scale = [torch.ones_like(w) for w in network.parameters()]
        if adaptive == "w2":
            scale = [w.detach().abs() for w in network.parameters()]
        if adaptive == "eta":
            named = network.named_parameters()
            scale = [w.detach().abs() + eta if "weight" in n else torch.ones_like(w) for n, w in named]
        norm = torch.cat([(t * g).flatten() for t, g in zip(scale, gradients, strict=True)]).norm()
        with torch.no_grad():
            for w, t, g in zip(moved.parameters(), scale, gradients, strict=True):
                w += rho * t * t * g / norm
        total += len(label) * (cross_entropy(moved(image), label) - loss).item()
    return total / SAMPLES


@pytest.mark.parametrize("adaptive", [None, "w2", "eta"])
def test_m_sharpness_is_the_direct_computation_whatever_the_batches(adaptive):
    for m in (1, 8, SAMPLES):
        expected = directly(m, 0.3, adaptive)
        assert expected > 0
        for size in (SAMPLES, 5):
            found = m_sharpness(mlp(), split(size), rho=0.3, m=m, adaptive=adaptive)
            assert found.item() == pytest.approx(expected, rel=1e-9)
    assert m_sharpness(mlp(), split(5), rho=0.3, m=None, adaptive=adaptive).item() == pytest.approx(expected, rel=1e-9)


def test_the_climb_is_that_of_the_official_code(golden_dir):
    import numpy as np

    golden = {
        k: torch.from_numpy(v) for k, v in np.load(golden_dir / "fsam.npz").items() if k[:3] in ("mlp", "sam", "asa")
    }
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    names, start = [f"mlp_{name}" for name in ("W1", "b1", "W2", "b2")], network.parameters()
    with torch.no_grad():
        for name, value in zip(names, start, strict=True):
            value.copy_(golden[name])
    batch = [(golden["mlp_x"][0], golden["mlp_y"][0])]
    for run, rho, adaptive in (("sam", 0.2, None), ("asam0", 0.5, "w2"), ("asam", 0.5, "eta")):
        mean_loss = MeanLoss(network, batch)
        epsilon = climb(mean_loss.parameters, mean_loss.gradient()[1], rho, adaptive, 0.01, mean_loss.names)
        torch.testing.assert_close(
            torch.cat([e.flatten() for e in epsilon]), golden[f"{run}_eps"][0], rtol=0, atol=1e-10
        )
        clean, perturbed = golden[f"{run}_loss"][0]
        found = m_sharpness(network, batch, rho=rho, m=None, adaptive=adaptive)
        assert found.item() == pytest.approx((perturbed - clean).item(), abs=1e-10)


def test_the_network_is_left_as_it_was():
    network = mlp()
    network[1].eval()  # a frozen BatchNorm among layers in train mode
    network[0].weight.grad = torch.ones_like(network[0].weight)
    network[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pointers = [value.data_ptr() for value in network.parameters()]
    state = torch.get_rng_state()
    for compute in (hessian_top_eigenvalues, hessian_trace, m_sharpness):
        compute(network, split(10))
    with pytest.raises(ZeroDivisionError):  # on the way back from the climb
        m_sharpness(network, split(10), loss=failing_at(2), m=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [value.data_ptr() for value in network.parameters()] == pointers
    assert [part.training for part in network.modules()] == [True, True, False, True, True, True]
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert network[4].weight.grad is None


def failing_at(sweep):
    calls = []

    def loss(output, label):
        calls.append(None)
        if len(calls) > (sweep - 1) * 4:
            raise ZeroDivisionError
        return cross_entropy(output, label)

    return loss


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(5, 24)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image):
        query, key, value = self.project(image)[:, None].reshape(-1, 1, 3, 8).expand(-1, 4, -1, -1).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(query + image.mean(), key.flip(1), value)
        return self.head(mixed.mean(1))


def test_attention_and_compiled_networks_are_differentiated_twice():
    expected = [f(mlp(), split(10)) for f in (hessian_top_eigenvalues, hessian_trace)]
    in_place = mlp()
    in_place.compile(backend="aot_eager")
    for network in (torch.compile(mlp(), backend="aot_eager"), in_place):
        network.eval()(samples()[0])
        assert hessian_top_eigenvalues(network, split(10)).values == expected[0].values
        assert hessian_trace(network, split(10)).value == expected[1].value
    encoder = nn.Sequential(nn.TransformerEncoderLayer(5, 1, 8, batch_first=True), nn.Flatten(), nn.Linear(5, CLASSES))
    for network in (Attention().float(), encoder):
        images, labels = samples(torch.float32)
        pair = (images, labels) if isinstance(network, Attention) else (images[:, None], labels)
        assert hessian_top_eigenvalues(network, split(10, pair)).values.isfinite()


def test_inference_mode_no_grad_and_autocast_change_nothing():
    expected = hessian_top_eigenvalues(mlp(), split(10)).values.item(), m_sharpness(mlp(), split(10)).item()
    network = mlp()
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            image, label = samples()
            batches = split(10, (image * 1.0, label))  # made inside
            assert hessian_top_eigenvalues(network, batches).values.item() == expected[0]
            assert m_sharpness(network, batches).item() == expected[1]


def test_constant_and_diverged_losses():
    linear = nn.Linear(5, 1).double()
    batches = split(10, (samples()[0], torch.ones(SAMPLES, dtype=torch.float64)))

    def plane(output, target):
        return output.squeeze(1).mul(target).mean()

    assert hessian_top_eigenvalues(linear, batches, loss=plane).values.item() == 0
    assert hessian_trace(linear, batches, loss=plane).value.item() == 0
    diverged = mlp()
    with torch.no_grad():
        diverged[0].weight.fill_(torch.nan)
    assert hessian_top_eigenvalues(diverged, split(10)).values.isnan()
    assert not hessian_top_eigenvalues(diverged, split(10)).converged
    assert m_sharpness(diverged, split(10)).isnan()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image):
        return image.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class OnceDifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(CLASSES, CLASSES).double()

    def forward(self, image):
        return self.head(Once.apply(self.body(image)).square())


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (nn.Flatten(), {}, "a Flatten, has no parameter that requires a gradient"),
        (mlp().bfloat16(), {}, r"parameter '0\.weight' is bfloat16, but second derivatives need float32 or float64"),
        (mlp(), {"batches": iter(split(10))}, "batches is an iterator, but it is read many times"),
        (mlp(), {"batches": []}, "batches is empty"),
        (
            mlp(),
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            r"loss gives a tensor \(10,\), but must give the mean",
        ),
        (mlp(), {"loss": lambda output, label: label.sum() * 1.0}, "loss does not depend on the network's parameters"),
        (
            OnceDifferentiable(),
            {},
            "product is not symmetric: if a Hessian's, some operation lacks its second derivative",
        ),
        (mlp(), {"k": 1000}, "k=1000 eigenvalues are asked for, but there are 69 dimensions"),
        (mlp(), {"k": 9, "max_sweeps": 8}, "max_sweeps is 8, it must be at least k=9"),
        (mlp(), {"k": 0}, "k is 0, it must be above 0"),
        (mlp(), {"tolerance": float("nan")}, "tolerance is nan, it must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(network, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        hessian_top_eigenvalues(network, **{"batches": split(10), **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("compute", "arguments", "message"),
    [
        (hessian_trace, {"probes": 0}, "probes is 0, it must be above 0"),
        (m_sharpness, {"rho": 0.0}, r"rho is 0\.0, it must be above 0"),
        (m_sharpness, {"m": -1}, "m is -1, it must be above 0"),
        (m_sharpness, {"adaptive": "w3"}, "adaptive is 'w3', allowed are None, w2 and eta"),
        (m_sharpness, {"eta": -1.0}, r"eta is -1\.0, it must be at least 0"),
        (m_sharpness, {"batches": []}, "batches is empty"),
    ],
)
def test_wrong_arguments_are_refused(compute, arguments, message):
    with pytest.raises(ValueError, match=message):
        compute(mlp(), **{"batches": split(10), **arguments})


def test_groups_are_cut_across_batches():
    labels = [
        [piece.tolist() for _, piece in group] for group in groups_of([(t, t) for t in torch.arange(11).split(4)], 5)
    ]
    assert labels == [[[0, 1, 2, 3], [4]], [[5, 6, 7], [8, 9]], [[10]]]
