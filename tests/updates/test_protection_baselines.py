"""What users rely on in every baseline protection: bounds, independence of batches, restored outcomes, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import assert_same_bits
from torchlethe.data.publishing import allowance, measure_change
from torchlethe.functional.autoregressive import autoregressive_pattern, filter_response, find_kernels, l2_scaled
from torchlethe.functional.gradient_norm import squared_gradient_norms
from torchlethe.functional.mean_loss import differentiable_twice
from torchlethe.functional.sign_descent import crop_and_flip
from torchlethe.models import Autoencoder, SmallCNN
from torchlethe.updates import protection as rules

SIZE = 48


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(SIZE) % 4
    image = torch.randint(0, 256, (SIZE, 1, 8, 8), dtype=torch.uint8, generator=generator)
    image[:, :, 2:4] = (60 * label)[:, None, None, None].to(torch.uint8)  # something to learn
    return {"image": image, "label": label, "index": 5 * torch.arange(SIZE) + 2}


def network(pooled=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN(num_classes=4, pooled=pooled)


def small_generator():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Autoencoder(1, 8)


JOINT = {"radius": 20, "batch_size": 16, "lr": 0.05}
MAKERS = {
    "random": lambda **k: rules.RandomNoiseProtector(20, **k),
    "ap_t": lambda **k: rules.AdversarialPoisoningProtector(
        network(), 4, radius=20, steps=4, restarts=2, crop=1, step=4.0, **k
    ),
    "ap_u": lambda **k: rules.AdversarialPoisoningProtector(
        network(), 4, variant="untargeted", radius=20, steps=4, restarts=1, crop=1, step=4.0, **k
    ),
    "hypocritical": lambda: rules.HypocriticalProtector(network(), radius=20, step=4.0, steps=4),
    "clog": lambda **k: rules.TensorClogProtector(network(), radius=20, step=4.0, steps=3, crop=1, at_once=9, **k),
    "em": lambda **k: rules.ErrorMinimizingProtector(network(), 4, rounds=3, steps=4, **{**JOINT, "step": 4.0, **k}),
    "em_class": lambda **k: rules.ErrorMinimizingProtector(
        network(), 4, noise_of="class", rounds=3, steps=2, **{**JOINT, "step": 4.0, **k}
    ),
    "emax": lambda **k: rules.ErrorMinimizingProtector(
        network(), 4, "emax", rounds=1, steps=4, **{**JOINT, "step": 4.0, **k}
    ),
    "rem": lambda **k: rules.RobustErrorMinimizingProtector(
        network(), steps=2, samples=2, attack_steps=2, crop=1, train_steps=4, **{**JOINT, "step": 8.0, **k}
    ),
    "confuse": lambda **k: rules.DeepConfuseProtector(
        network(), small_generator(), radius=20, rounds=2, steps=3, batch_size=16, **k
    ),
    "lsp": lambda **k: rules.SyntheticShortcutProtector(4, radius=20, patch=2, **k),
    "ar": lambda **k: rules.AutoregressiveProtector(4, min_response=1.0, **k),
    "ops": lambda: rules.OnePixelShortcutProtector(4),
}
SEEDLESS = {"hypocritical", "ops"}
pytestmark = pytest.mark.filterwarnings("ignore:after rounds=")


def split(data, size):
    parts = (value.split(size) for value in data.values())
    return [dict(zip(data, part, strict=True)) for part in zip(*parts, strict=True)]


def protected(rule, data, size=SIZE):
    return torch.cat([rule.protect(**batch) for batch in split(data, size)])


def prepared(name, data, size=SIZE, **settings):
    rule = MAKERS[name](**settings)
    rule.prepare(split(data, size), device="cpu")
    return rule


@pytest.mark.parametrize("name", MAKERS)
def test_protection(name, data):
    rule = MAKERS[name]()
    before = {key: copy.deepcopy(part) for key, part in rule.networks.items()}
    modes = {key: [module.training for module in part.modules()] for key, part in rule.networks.items()}
    state, bound = torch.get_rng_state(), rule.bound()
    rule.prepare(split(data, 20), device="cpu")
    with torch.inference_mode():
        found = protected(rule, data)

    # what it promises holds, and it does something
    change = measure_change(data["image"], found)[bound["norm"]]
    assert bool((change <= allowance(bound, 64)).all())
    assert float(change.double().mean()) > 0.3 * bound["value"]
    assert found.dtype is torch.uint8
    assert found.shape == data["image"].shape

    # neither batches nor their order matter
    shuffled = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    other = prepared(name, {key: value[shuffled] for key, value in data.items()}, 7)
    agree = (protected(other, data, 7) == found).float().mean()
    assert agree > (0.97 if rule.networks else 0.9999), f"{1 - agree:.2%} of the values differ"

    # the outcome can be kept
    again = MAKERS[name]()
    assert again.fingerprint() == rule.fingerprint()
    again.load_state_dict(rule.state_dict())
    again.to("cpu")
    assert torch.equal(protected(again, data), found)

    # networks, random numbers and modes are what they were
    for key, part in before.items():
        assert_same_bits(part, rule.networks[key])
        assert [module.training for module in rule.networks[key].modules()] == modes[key]
        assert all(p.requires_grad and p.grad is None for p in rule.networks[key].parameters()) or key == "generator"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - SEEDLESS))
def test_seed_changes_noise_and_fingerprint(name, data):
    first, second = prepared(name, data, seed=0), prepared(name, data, seed=1)
    assert first.fingerprint() != second.fingerprint()
    if name == "emax":  # one pass against a network that is given
        assert torch.equal(protected(first, data), protected(second, data))
    else:
        assert not torch.equal(protected(first, data), protected(second, data))


def trained(data):
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(data["image"].float() / 255), data["label"]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def losses(model, image, label):
    return F.cross_entropy(model(image.float() / 255), label, reduction="none")


def test_losses_go_where_each_method_says(data):
    model, label = trained(data), data["label"]
    clean = data["image"]
    common = {"radius": 20, "step": 2.0, "steps": 10, "crop": 0, "flip": False}

    targeted = rules.AdversarialPoisoningProtector(model, 4, restarts=1, **common).protect(**data)
    assert losses(model, targeted, (label + 1) % 4).mean() < losses(model, clean, (label + 1) % 4).mean() - 0.3
    rule = rules.AdversarialPoisoningProtector(model, 4, variant="untargeted", restarts=1, **common)
    assert losses(model, rule.protect(**data), label).mean() > losses(model, clean, label).mean() + 0.3
    rule = rules.HypocriticalProtector(model, 20, 2.0, 10)
    assert losses(model, rule.protect(**data), label).mean() < losses(model, clean, label).mean()
    torch.testing.assert_close(rule.notes["crafting_loss"], losses(model, rule.protect(**data), label))

    norms = {}
    for variant in ("clog", "explode"):
        rule = rules.TensorClogProtector(model, variant, **common)
        image = rule.protect(**data)
        with differentiable_twice(model):
            norms[variant] = squared_gradient_norms(model, image.float() / 255, label).detach()
            start = squared_gradient_norms(model, clean.float() / 255, label).detach()
    assert norms["clog"].mean() < start.mean() < norms["explode"].mean()


def test_restarts_keep_the_smallest_loss_of_each_image(data):
    model = trained(data)

    def crafted(restarts):
        rule = rules.AdversarialPoisoningProtector(
            model, 4, restarts=restarts, radius=20, step=2.0, steps=3, crop=0, flip=False
        )
        rule.protect(**data)
        return rule.notes["crafting_loss"]

    one, four = crafted(1), crafted(4)
    assert bool((four <= one).all())
    assert bool((four < one).any())


def test_gradient_norms_are_those_of_single_images(data):
    model = trained(data).double()
    image, label = (data["image"][:5].double() / 255).requires_grad_(), data["label"][:5]
    with differentiable_twice(model):
        found = squared_gradient_norms(model, image, label)
        (slope,) = torch.autograd.grad(found.sum(), image)
        for k in range(5):
            single = image[k : k + 1].detach().requires_grad_()
            loss = F.cross_entropy(model(single), label[k : k + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            square = sum(gradient.square().sum() for gradient in gradients)
            torch.testing.assert_close(found[k], square)
            torch.testing.assert_close(slope[k], torch.autograd.grad(square, single)[0][0])


def test_error_minimising_noise_is_easy_to_fit(data):
    rule = MAKERS["em"](seed=2)
    logs = rule.prepare(split(data, 20), device="cpu")
    assert logs["rounds"] <= 3
    model = trained(data | {"image": protected(rule, data)})
    assert losses(model, protected(rule, data), data["label"]).mean() < 0.2


def test_rounds_that_end_too_early_are_reported(data):
    rule = MAKERS["em"](lr=1e-6)
    with pytest.warns(UserWarning, match=r"after rounds=3 .* stop_error=0.01 was not reached"):
        rule.prepare([data], device="cpu")


def test_class_noise_protects_images_that_were_not_there(data):
    rule = prepared("em_class", data)
    new = rule.protect(torch.full_like(data["image"], 128), data["label"], data["index"] + 10_000)
    same = [new[data["label"] == number].unique(dim=0) for number in range(4)]
    assert all(len(rows) == 1 for rows in same)
    assert len(torch.cat(same).unique(dim=0)) == 4


@pytest.mark.parametrize("name", ["em", "rem", "lsp"])
def test_an_unknown_index_is_refused(name, data):
    rule = prepared(name, data)
    with pytest.raises(ValueError, match="index 3 was not among the images that were prepared on"):
        rule.protect(data["image"][:1], data["label"][:1], torch.tensor([3]))


def test_crops_move_and_mirror_exactly_and_gradients_come_back():
    image = torch.rand(6, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[0, 0], [1, -2], [-3, 3], [5, 0], [2, 2], [-1, -1]])
    flip = torch.tensor([False, True, False, True, True, False])
    padded = F.pad(image, (5, 5, 5, 5))
    expected = torch.stack([padded[k, :, 5 + y : 10 + y, 5 + x : 12 + x] for k, (y, x) in enumerate(shift.tolist())])
    expected = torch.where(flip[:, None, None, None], expected.flip(-1), expected)
    found = crop_and_flip(image, shift, flip)
    torch.testing.assert_close(found, expected)
    weight = torch.rand_like(found)
    ours = torch.autograd.grad((found * weight).sum(), image)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weight).sum(), image)[0])
    assert torch.autograd.gradcheck(lambda x: crop_and_flip(x, shift, flip), image)


def test_kernels_are_bounded_and_told_apart():
    generator = torch.Generator().manual_seed(0)
    kernels = find_kernels(3, 3, (32, 32), generator)
    assert kernels.shape == (3, 3, 3, 3)
    torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(3, 3, dtype=torch.float64))
    label = torch.arange(3).repeat_interleave(20)
    start = torch.randn(60, 3, 36, 36, dtype=torch.float64, generator=generator)
    delta, norms = l2_scaled(autoregressive_pattern(kernels, label, start), 1.0, 4)
    assert norms.median() < 50
    response = filter_response(kernels, delta).view(3, 20, 3).median(1).values
    assert bool((response.diagonal() < 1e-9).all())
    # the rule looks at earlier filters and later patterns
    assert bool((response[torch.ones(3, 3).tril(-1).bool()] > 8).all())


def test_one_pixel_is_shared_by_ranks(data):
    whole = prepared("ops", data)
    shards = [{name: value[k::2] for name, value in data.items()} for k in range(2)]
    seen: list[list[torch.Tensor]] = [[], []]

    class Both:
        """A sum over two ranks that take turns: the first pass collects, the second one adds."""

        def __init__(self, rank):
            self.rank, self.count = rank, 0

        def __call__(self, tensor):
            if len(seen[self.rank]) < 3:
                seen[self.rank].append(tensor)
                return tensor
            self.count += 1
            return seen[0][self.count - 1] + seen[1][self.count - 1]

    for rank in range(2):
        rules.OnePixelShortcutProtector(4).prepare([shards[rank]], device="cpu", reduce=Both(rank))
    for rank in range(2):
        rule = rules.OnePixelShortcutProtector(4)
        rule.prepare([shards[rank]], device="cpu", reduce=Both(rank))
        assert torch.equal(rule.position, whole.position)
        assert torch.equal(rule.colour, whole.colour)
    assert len(torch.cat([whole.position, whole.colour], 1).unique(dim=0)) == 4


class Hard(nn.Module):
    """A network whose gradient has no derivative."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, image):
        return _OnceOnly.apply(self.linear(image.flatten(1)))


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_networks_without_second_derivative_are_refused(data):
    with pytest.raises(ValueError, match="Hard, cannot be differentiated twice for each image, as TensorClog needs"):
        rules.TensorClogProtector(Hard(), steps=1).protect(**data)
    with pytest.raises(ValueError, match="Hard, cannot be differentiated twice, as DeepConfuse needs"):
        rules.DeepConfuseProtector(Hard(), small_generator(), steps=1).prepare([data], device="cpu")
    with pytest.raises(ValueError, match="the weights are bfloat16, TensorClog needs float32 or float64"):
        rules.TensorClogProtector(network().bfloat16()).protect(**data)


def test_half_precision_networks_keep_the_pixel_units(data):
    low = rules.HypocriticalProtector(network().bfloat16(), radius=20, step=4.0, steps=5)
    change = (low.protect(**data).int() - data["image"].int()).abs()
    assert int(change.max()) == 20
    full = rules.HypocriticalProtector(network(), radius=20, step=4.0, steps=5)
    assert (full.protect(**data) == low.protect(**data)).float().mean() > 0.8


REFUSALS = [
    (lambda: rules.RandomNoiseProtector(0), r"radius is 0, it must be a whole number in 1…255"),
    (lambda: rules.RandomNoiseProtector(2.5), r"radius is 2.5, it must be a whole number"),
    (lambda: rules.AdversarialPoisoningProtector(network(), 4, variant="both"), "variant is 'both'"),
    (lambda: rules.AdversarialPoisoningProtector(network(), 4, shift=8), "shift is 8, which maps each of the 4"),
    (lambda: rules.AdversarialPoisoningProtector(network(), 4, step=-1.0), "step is -1.0, it must be at least 0.05"),
    (lambda: rules.HypocriticalProtector(network(), steps=0), "steps is 0, it must be at least 1"),
    (lambda: rules.ErrorMinimizingProtector(network(), 4, share=0.5), "each image needs noise of its own"),
    (lambda: rules.ErrorMinimizingProtector(network(), 4, "min"), "objective is 'min', allowed are emin and emax"),
    (lambda: rules.RobustErrorMinimizingProtector(network(), samples=0), "samples is 0"),
    (lambda: rules.SyntheticShortcutProtector(4, patch=0), "patch is 0"),
    (lambda: rules.AutoregressiveProtector(1), "num_classes is 1, it must be at least 2"),
    (lambda: rules.DeepConfuseProtector(network(), lr=0.0), "lr is 0.0, it must be above 0"),
    (lambda: Autoencoder(1, 12), "width is 12, it must be a multiple of 8"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS, ids=[message[:24] for _, message in REFUSALS])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refusals_of_data(data):
    with pytest.raises(ValueError, match="patch is 8, which leaves 1 values"):
        rules.SyntheticShortcutProtector(4).prepare([data], device="cpu")
    with pytest.raises(ValueError, match=r"min_response is 1000\.0, with which only 1 of 4 classes"):
        rules.AutoregressiveProtector(4, min_response=1000.0).prepare([data], device="cpu")
    with pytest.raises(ValueError, match="several images of the same index"):
        MAKERS["em"]().prepare([data, data], device="cpu")
    with pytest.raises(RuntimeError, match=r"prepare\(\) has to choose the pixels"):
        MAKERS["ops"]().protect(**data)
