import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from torchlethe.functional import hessian_top_eigenvalues, hessian_trace, m_sharpness
from torchlethe.metrics import METRIC_DEFINITIONS, HessianTopEigenvalue, HessianTrace, MSharpness


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (30,), generator=generator)
    return list(zip(image.split(8), label.split(8), strict=True))


def metrics(net):
    return {
        "top": HessianTopEigenvalue(net, k=2, tolerance=1e-5),
        "trace": HessianTrace(net, probes=5),
        "sharpness": MSharpness(net, rho=0.2, m=7, adaptive="eta"),
    }


def test_values_are_those_of_the_functions_and_padding_is_left_out():
    net = network()
    found = MetricCollection(metrics(net), compute_groups=False)
    for image, label in batches():
        padded = torch.cat([image, image[:2]]), torch.cat([label, torch.full((2,), -100)])
        found.update(*padded)
    values = found.compute()
    top = hessian_top_eigenvalues(net, batches(), k=2, tolerance=1e-5)
    torch.testing.assert_close(values["top"], top.values, rtol=1e-12, atol=0)
    assert found["top"].found.sweeps == top.sweeps
    trace = hessian_trace(net, batches(), probes=5)
    torch.testing.assert_close(values["trace"], trace.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["trace"].found.standard_error, trace.standard_error, rtol=1e-12, atol=0)
    assert values["sharpness"] == m_sharpness(net, batches(), rho=0.2, m=7, adaptive="eta")


def test_the_network_is_borrowed():
    net = network()
    metric = HessianTrace(net, probes=3, loss=nn.CrossEntropyLoss(weight=torch.ones(3).double()))
    assert not list(metric.parameters())
    assert not metric.state_dict()
    parent = nn.ModuleDict({"network": net, "metric": metric})
    assert len(list(parent.parameters())) == len(list(net.parameters()))
    metric.update(*batches()[0])
    before = metric.compute()
    copy = metric.clone()
    with torch.no_grad():
        net[3].weight.mul_(2)
    after = hessian_trace(net, batches()[:1], probes=3).value
    assert copy.compute() == metric.compute() == after  # the very same network, at its weights of now
    assert before != after


def test_batches_are_forgotten_at_reset_and_kept_by_forward():
    net = network()
    metric = MSharpness(net, rho=0.2, m=None)
    first, second = batches()[:2]
    assert metric(*first) == m_sharpness(net, [first], rho=0.2, m=None)
    assert metric(*second) == m_sharpness(net, [second], rho=0.2, m=None)
    assert metric.compute() == m_sharpness(net, [first, second], rho=0.2, m=None)
    metric.reset()
    metric.update(*second)
    assert metric.compute() == m_sharpness(net, [second], rho=0.2, m=None)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"network is a dict, it must be a torch\.nn\.Module"):
        HessianTrace({})
    for build, message in (
        (lambda: HessianTopEigenvalue(network(), k=0), "k is 0"),
        (lambda: HessianTrace(network(), probes=0), "probes is 0"),
        (lambda: MSharpness(network(), rho=-1.0), r"rho is -1\.0"),
        (lambda: MSharpness(network(), adaptive="abs"), "adaptive is 'abs', allowed are None, w2 and eta"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    metric = HessianTrace(network())
    with pytest.raises(ValueError, match=r"label has the shape \(8, 3\), it must hold one for each of 4 images"):
        metric.update(torch.rand(4, 5), torch.zeros(8, 3))
    with pytest.raises(ValueError, match="batches is empty"), pytest.warns(UserWarning, match="before"):
        HessianTrace(network()).compute()


@pytest.mark.parametrize("name", ["hessian_top_eigenvalue", "hessian_trace", "m_sharpness", "train_loss", "test_loss"])
def test_every_metric_has_a_definition(name):
    definition = METRIC_DEFINITIONS[name]
    assert definition.orientation == "lower"
    assert definition.definition.endswith(".")
