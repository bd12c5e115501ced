"""What users of the optimizers rely on: identities, state, schedulers, Fabric, and refusals."""

import copy

import lightning
import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers import quiet_trainer
from tests.optimizers.problems import SGD, convolution, flat, golden, mlp, run
from torchlethe.cli import main
from torchlethe.components import NonFiniteGradientError, SharpnessEngine
from torchlethe.optimizers import ASAM, ESAM, GSAM, SAM, SAMON, WSAM, FriendlySAM, LookSAM, VaSSO, sam_step

ALL = {
    "sam": lambda m, **k: SAM(m.parameters(), rho=0.2, **k),
    "asam": lambda m, **k: ASAM(m.named_parameters(), rho=0.5, **k),
    "fsam": lambda m, **k: FriendlySAM(m.parameters(), rho=0.2, lmbda=0.6, **k),
    "vasso": lambda m, **k: VaSSO(m.parameters(), rho=0.2, **k),
    "gsam": lambda m, **k: GSAM(m.parameters(), rho=0.2, **k),
    "wsam": lambda m, **k: WSAM(m.parameters(), rho=0.2, **k),
    "looksam": lambda m, **k: LookSAM(m.parameters(), rho=0.2, alpha=0.3, interval=2, **k),
    "esam": lambda m, **k: ESAM(m.parameters(), rho=0.2, gamma=1.0, **k),
}


@pytest.fixture
def arrays(golden_dir):
    return golden(golden_dir)


def weights_of(make, arrays, **options):
    network = mlp(arrays)
    found = run(network, make(network, **options), arrays["mlp_x"], arrays["mlp_y"])
    return torch.stack(found.weights)


def plain(arrays, make=lambda m: torch.optim.SGD(m.parameters(), **SGD)):
    network = mlp(arrays)
    return torch.stack(run(network, make(network), arrays["mlp_x"], arrays["mlp_y"]).weights)


# --- identities ------------------------------------------------------------------------------------------------------


def test_friendly_sam_without_removal_is_sam(arrays):
    without = weights_of(lambda m: FriendlySAM(m.parameters(), rho=0.2, sigma=0.0, **SGD), arrays)
    torch.testing.assert_close(without, weights_of(ALL["sam"], arrays, **SGD), atol=1e-14, rtol=0)


def test_the_first_step_of_friendly_sam_is_sam(arrays):
    sam, friendly = (weights_of(ALL[name], arrays, **SGD) for name in ("sam", "fsam"))
    assert torch.equal(sam[0], friendly[0])
    assert not torch.allclose(sam[-1], friendly[-1])


def test_paper_order_is_the_code_order_with_another_sigma(arrays):
    """Hand-written: d = g − σ·m with the average from after the batch."""
    sigma, lmbda, rho = 0.7, 0.9, 0.2
    network = mlp(arrays)
    base, m = torch.optim.SGD(network.parameters(), **SGD), None
    for image, label in zip(arrays["mlp_x"], arrays["mlp_y"], strict=True):
        params, before = list(network.parameters()), [p.detach().clone() for p in network.parameters()]
        g = torch.autograd.grad(nn.functional.cross_entropy(network(image), label), params)
        fresh = m is None
        m = list(g) if fresh else [lmbda * a + (1 - lmbda) * b for a, b in zip(m, g, strict=True)]
        d = g if fresh else [b - sigma * a for a, b in zip(m, g, strict=True)]
        with torch.no_grad():
            for p, direction in zip(params, d, strict=True):
                p.add_(rho * direction / (flat(d).norm() + 1e-12))
        gradient = torch.autograd.grad(nn.functional.cross_entropy(network(image), label), params)
        with torch.no_grad():
            for p, old, new in zip(params, before, gradient, strict=True):
                p.copy_(old)
                p.grad = new
        base.step()
    options = {"rho": rho, "sigma": sigma, "lmbda": lmbda, "order": "paper"}
    found = weights_of(lambda m: FriendlySAM(m.parameters(), **options, **SGD), arrays)[-1]
    torch.testing.assert_close(found, flat(network.parameters()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("decoupled", [False, True])
def test_wsam_lies_between_base_and_sam(decoupled, arrays):
    make = lambda gamma: lambda m: WSAM(m.parameters(), rho=0.2, gamma=gamma, decoupled=decoupled, lr=0.1)  # noqa: E731
    torch.testing.assert_close(
        weights_of(make(0.0), arrays), plain(arrays, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), atol=0, rtol=0
    )
    sam = weights_of(lambda m: SAM(m.parameters(), rho=0.2, lr=0.1), arrays)
    torch.testing.assert_close(weights_of(make(0.5), arrays), sam, atol=1e-13, rtol=0)


def test_gsam_without_alpha_is_sam(arrays):
    found = weights_of(lambda m: GSAM(m.parameters(), rho=0.2, alpha=0.0, **SGD), arrays)
    torch.testing.assert_close(found, weights_of(ALL["sam"], arrays, **SGD), atol=1e-14, rtol=0)


def test_looksam_reuses_the_orthogonal_part(arrays):
    """Two steps against the paper's formulas."""
    rho, alpha, rate = 0.2, 0.3, 0.1
    network = mlp(arrays)
    params = list(network.parameters())

    def gradient(step):
        loss = nn.functional.cross_entropy(network(arrays["mlp_x"][step]), arrays["mlp_y"][step])
        return flat(torch.autograd.grad(loss, params))

    def move(by):
        with torch.no_grad():
            for p, part in zip(params, by.split([p.numel() for p in params]), strict=True):
                p.add_(part.view_as(p))

    g = gradient(0)
    climb = rho * g / (g.norm() + 1e-12)
    move(climb)
    top = gradient(0)
    move(-climb)
    part = top - (g @ top) / (g @ g) * g
    move(-rate * top)
    g = gradient(1)
    move(-rate * (g + alpha * g.norm() / (part.norm() + 1e-8) * part))
    found = weights_of(lambda m: LookSAM(m.parameters(), rho=rho, alpha=alpha, interval=2, lr=rate), arrays)
    torch.testing.assert_close(found[1], flat(params), atol=1e-12, rtol=0)


def test_interval_makes_plain_steps_in_between(arrays):
    network = mlp(arrays)
    optimizer = SAM(network.parameters(), rho=0.2, interval=3, **SGD)
    assert [len(losses) for losses in run(network, optimizer, arrays["mlp_x"], arrays["mlp_y"]).losses] == [2, 1, 1] * 2


def test_the_average_follows_in_plain_steps(arrays):
    found = {}
    for interval in (1, 100):
        network = mlp(arrays)
        optimizer = FriendlySAM(network.parameters(), rho=1e-9, lmbda=0.6, interval=interval, lr=0.1)
        run(network, optimizer, arrays["mlp_x"], arrays["mlp_y"])
        found[interval] = flat(optimizer.engine.memory.buffers["ema"].values())
    torch.testing.assert_close(found[1], found[100], atol=1e-7, rtol=0)


def test_the_perturbation_has_length_rho(arrays):
    for name in ("sam", "fsam"):
        network = mlp(arrays)
        found = run(network, ALL[name](network, **SGD), arrays["mlp_x"], arrays["mlp_y"])
        torch.testing.assert_close(
            torch.stack(found.epsilons).norm(dim=1), torch.full((6,), 0.2, dtype=torch.float64), atol=1e-9, rtol=0
        )


def test_the_radius_follows_the_learning_rate_between_its_bounds():
    engine = SharpnessEngine("gsam", 0.4, rho_schedule="lr", rho_end=0.1)
    group = {"lr": 0.3, "initial_lr": 0.5, "min_lr": 0.1}
    found = [engine.radius(group | change, 0) for change in ({}, {"lr": 0.5}, {"lr": 0.1}, {"lr": 0.0}, {"rho": 0.9})]
    assert found == pytest.approx([0.25, 0.4, 0.1, 0.1, 0.5])


def test_layerwise_norm_gives_each_tensor_the_radius(arrays):
    network = mlp(arrays)
    engine = SharpnessEngine("sam", 0.3, norm="layerwise")
    params = list(network.parameters())
    before = [p.detach().clone() for p in params]
    loss = nn.functional.cross_entropy(network(arrays["mlp_x"][0]), arrays["mlp_y"][0])
    engine.climb(params, torch.autograd.grad(loss, params), [0.3] * 4)
    assert [round((p - old).norm().item(), 9) for p, old in zip(params, before, strict=True)] == [0.3] * 4
    engine.restore()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_no_climb_where_only_rounding_noise_is_left(arrays):
    """Twice the same batch: the second direction is g − g."""
    images, labels = arrays["mlp_x"][[0, 0]], arrays["mlp_y"][[0, 0]]
    length = {}
    for ratio in (0.0, 1e-6):
        network = mlp(arrays)
        optimizer = FriendlySAM(network.parameters(), rho=0.2, min_noise_ratio=ratio, lr=1e-18)
        length[ratio] = run(network, optimizer, images, labels).epsilons[1].norm().item()
    assert length[1e-6] == 0.0


def test_sam_on_moves_normalisation_layers_only(arrays):
    network = convolution(arrays)
    optimizer = SAMON(network.parameters(), rho=0.2, module=network, lr=0.1)
    epsilon = run(network, optimizer, arrays["conv_x"], arrays["conv_y"]).epsilons[0]
    sizes = [p.numel() for p in network.parameters()]
    moved = [bool(part.any()) for part in epsilon.split(sizes)]
    assert moved == [False, True, True, False, False]


def test_esam_takes_the_samples_that_rise_most_and_repeats_itself(arrays):
    found = []
    for _ in range(2):
        network = mlp(arrays)
        optimizer = ESAM(network.parameters(), rho=0.2, beta=0.5, gamma=0.5, seed=3, **SGD)
        image, label, seen = arrays["mlp_x"][0], arrays["mlp_y"][0], []

        def losses(network=network, image=image, label=label):
            return nn.functional.cross_entropy(network(image), label, reduction="none")

        def closure(positions=None, optimizer=optimizer, losses=losses, seen=seen):
            optimizer.zero_grad()
            each = losses()
            seen.append((positions, each.detach()))
            loss = each.mean() if positions is None else each[positions].mean()
            loss.backward()
            return loss

        optimizer.step(closure, losses)
        (_, clean), (positions, perturbed) = seen
        assert sorted(positions.tolist()) == sorted((perturbed - clean).topk(4).indices.tolist())
        found.append(flat(network.parameters()))
    assert torch.equal(*found)


# --- one optimizer for torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_resumed_run_goes_on_to_the_same_bits(name, base, arrays):
    options = {"base_optimizer": base, "lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    whole = weights_of(ALL[name], arrays, **options)
    network = mlp(arrays)
    optimizer = ALL[name](network, **options)
    run(network, optimizer, arrays["mlp_x"][:3], arrays["mlp_y"][:3])
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    network = mlp(arrays)
    optimizer = ALL[name](network, **options)
    network.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    found = run(network, optimizer, arrays["mlp_x"][3:], arrays["mlp_y"][3:])
    assert torch.equal(found.weights[-1], whole[-1])


def test_the_state_holds_no_weights_and_loads_safely(arrays, tmp_path):
    network = mlp(arrays)
    optimizer = ALL["fsam"](network, **SGD)
    run(network, optimizer, arrays["mlp_x"], arrays["mlp_y"])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    tensors = [*state["sharpness"]["memory"]["ema"].values(), *(s["momentum_buffer"] for s in state["state"].values())]
    assert not any(torch.equal(t, p) for t in tensors for p in network.parameters() if t.shape == p.shape)
    with pytest.raises(ValueError, match="has no 'sharpness'"):
        optimizer.load_state_dict(torch.optim.SGD(network.parameters(), **SGD).state_dict())
    with pytest.raises(ValueError, match="holds ema, but this method keeps nothing"):
        ALL["sam"](network, **SGD).load_state_dict(state)


def test_schedulers_and_new_groups_reach_the_base_optimizer(arrays):
    network, extra = mlp(arrays), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ALL["fsam"](network, **SGD)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    run(network, optimizer, arrays["mlp_x"][:1], arrays["mlp_y"][:1])
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    assert optimizer.base.param_groups[1]["params"] == [extra]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups


def test_first_and_second_step_are_the_official_ones(arrays):
    network = mlp(arrays)
    optimizer = ALL["fsam"](network, **SGD)
    for image, label in zip(arrays["mlp_x"], arrays["mlp_y"], strict=True):
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(flat(network.parameters()), arrays["fsam_w"][-1], atol=1e-10, rtol=0)


def test_official_closures_make_the_second_pass_only(arrays):
    network = mlp(arrays)
    optimizer = ALL["fsam"](network, closure_style="official", **SGD)
    for image, label, losses in zip(arrays["mlp_x"], arrays["mlp_y"], arrays["fsam_loss"], strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(image), label).backward()

        def closure(image=image, label=label):
            loss = nn.functional.cross_entropy(network(image), label)
            loss.backward()
            return loss

        torch.testing.assert_close(optimizer.step(closure).detach(), losses[1], atol=1e-10, rtol=0)
    torch.testing.assert_close(flat(network.parameters()), arrays["fsam_w"][-1], atol=1e-10, rtol=0)


def test_weights_come_back_when_the_second_pass_fails_or_misses_a_tensor(arrays):
    network = mlp(arrays)
    before = flat(network.parameters())
    optimizer = SAM(network.parameters(), rho=0.2, lr=0.0)
    calls = []

    def closure(fail):
        optimizer.zero_grad()
        calls.append(fail)
        first = len(calls) % 2
        if fail and not first:
            raise RuntimeError("out of memory")
        # the last bias has a gradient in the first pass only
        bias = network[2].bias if first else network[2].bias.detach()
        logits = nn.functional.linear(network[1](network[0](arrays["mlp_x"][0])), network[2].weight, bias)
        loss = nn.functional.cross_entropy(logits, arrays["mlp_y"][0])
        loss.backward()
        return loss

    optimizer.step(lambda: closure(False))
    assert torch.equal(flat(network.parameters()), before)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(lambda: closure(True))
    assert torch.equal(flat(network.parameters()), before)


def test_storage_stays_in_place(arrays):
    """CUDA graphs and caches hold on to pointers."""
    network = mlp(arrays)
    pointers = [p.data_ptr() for p in network.parameters()]
    run(network, ALL["fsam"](network, **SGD), arrays["mlp_x"], arrays["mlp_y"])
    assert [p.data_ptr() for p in network.parameters()] == pointers


def test_fabric_runs_it(arrays):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
    network = mlp(arrays)
    model, optimizer = fabric.setup(network, ALL["fsam"](network, **SGD))
    for image, label in zip(arrays["mlp_x"], arrays["mlp_y"], strict=True):

        def closure(image=image, label=label):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(image), label)
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
    # Fabric brings the loss to float32
    torch.testing.assert_close(flat(network.parameters()), arrays["fsam_w"][-1], atol=1e-6, rtol=0)


# --- Lightning -------------------------------------------------------------------------------------------------------


class Automatic(lightning.LightningModule):
    def __init__(self, arrays):
        super().__init__()
        self.network = mlp(arrays)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return ALL["fsam"](self.network, **SGD)


class Manual(Automatic):
    def __init__(self, arrays, method="fsam"):
        super().__init__(arrays)
        self.automatic_optimization = False
        self.engine = SharpnessEngine(method, 0.2, lmbda=0.6)

    def training_step(self, batch, batch_idx):
        def closure():
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        return sam_step(self.optimizers(), closure, self.engine, module=self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), **SGD)


def batches(arrays):
    return DataLoader(list(zip(arrays["mlp_x"], arrays["mlp_y"], strict=True)), batch_size=None)


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_under_a_trainer_it_agrees_with_the_official_code(kind, arrays):
    module = kind(arrays)
    trainer = quiet_trainer(max_epochs=1, precision="64-true")
    trainer.fit(module, batches(arrays))
    torch.testing.assert_close(flat(module.parameters()), arrays["fsam_w"][-1], atol=1e-10, rtol=0)
    assert trainer.global_step == 6


def test_a_step_by_hand_refuses_what_it_cannot_serve(arrays):
    network, engine = mlp(arrays).float(), SharpnessEngine("sam")
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    _, scaled = fabric.setup(network, torch.optim.SGD(network.parameters(), **SGD))
    for optimizer, sentence in (
        (scaled, "precision is 16-mixed, but sam_step sees scaled gradients: use bf16-mixed"),
        (SAM(network.parameters(), **SGD), "optimizer is a SAM, which makes two passes itself"),
        ([scaled], "optimizer is a list, it must be one optimizer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sam_step(optimizer, lambda: None, engine)


def test_a_configuration_file_may_name_the_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "fit --model Classifier --model.network torchlethe.models.MLP --model.num_classes 10 --data DigitsDataModule"
        " --model.optimizer FriendlySAM --model.optimizer.rho 0.2 --model.optimizer.memory_dtype bfloat16"
        " --model.optimizer.base_optimizer torch.optim.SGD --model.optimizer.base_optimizer.lr 0.1"
        " --trainer.accelerator cpu --trainer.max_steps 3 --trainer.logger false --trainer.enable_progress_bar false"
    )
    assert main(words.split()) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert state["sharpness"]["steps"] == 3
    assert {value.dtype for value in state["sharpness"]["memory"]["ema"].values()} == {torch.bfloat16}
    assert state["param_groups"][0]["lr"] == 0.1


def test_accumulation_under_a_trainer_is_refused_and_names_the_callback(arrays):
    trainer = quiet_trainer(max_epochs=1, precision="64-true", accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match=r"does not zero the gradients.*callbacks\.SharpnessAware"):
        trainer.fit(Automatic(arrays), batches(arrays))


def test_loss_scaling_is_refused_and_names_the_callback(arrays):
    network = mlp(arrays).float()
    optimizer = SAM(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(network(arrays["mlp_x"][0].float()).sum()).backward()
    with pytest.raises(RuntimeError, match=r"fp16 loss scaling.*callbacks\.SharpnessAware"):
        scaler.step(optimizer)


# --- wrong use -------------------------------------------------------------------------------------------------------


def weight():
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(weight(), rho=0.0), "rho is 0.0, it must be a positive number"),
        (lambda: SAM(weight(), rho=float("nan")), "rho is nan"),
        (lambda: FriendlySAM(weight(), sigma=-1), "sigma is -1, it must be at least 0"),
        (lambda: FriendlySAM(weight(), lmbda=1.5), r"lmbda is 1.5, it must lie in \[0, 1\]"),
        (lambda: FriendlySAM(weight(), sigma=3, lmbda=0.5, order="paper"), "order='paper' needs"),
        (lambda: VaSSO(weight(), theta=0), r"theta is 0, it must lie in \(0, 1\]"),
        (lambda: WSAM(weight(), gamma=1), r"gamma is 1, it must lie in \[0, 1\)"),
        (lambda: ESAM(weight(), beta=0), "beta is 0"),
        (lambda: LookSAM(weight(), interval=0), "interval is 0, it must be at least 1"),
        (lambda: ASAM(weight()), "needs the names of the parameters"),
        (lambda: SAMON(weight()), "module is missing"),
        (lambda: SAMON(weight(), module=nn.Linear(2, 2)), "no normalisation layer"),
        (lambda: SAM(weight(), torch.optim.LBFGS), "LBFGS, which runs closures of its own"),
        (lambda: SAM(weight(), SAM), "a SAM, which runs closures"),
        (lambda: SAM(weight(), closure_style="none"), "closure_style is 'none'"),
        (lambda: SharpnessEngine("best"), "method is 'best', allowed are fsam, sam"),
        (lambda: SharpnessEngine("sam", sigma=1.0), "sigma is no option of method='sam': it has no options"),
        (lambda: SharpnessEngine("fsam", alpha=1.0), "alpha is no option of method='fsam': its options are sigma"),
        (lambda: SharpnessEngine("sam", norm="l1"), "norm is 'l1'"),
        (lambda: FriendlySAM(weight(), memory_dtype="int8"), "memory_dtype is 'int8', it must name a floating-point"),
        (lambda: SharpnessEngine("sam", rho_schedule="linear").radius({"lr": 1.0}, 0), "known number of steps"),
    ],
)
def test_wrong_arguments_get_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sparse_gradients_are_refused_with_the_name():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(table.named_parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="'weight' has a sparse gradient"):
        optimizer.step(closure)


def test_a_gradient_that_is_not_finite_changes_nothing(arrays):
    network = mlp(arrays)
    optimizer = ALL["fsam"](network, **SGD)
    run(network, optimizer, arrays["mlp_x"][:2], arrays["mlp_y"][:2])
    before = flat(network.parameters()), flat(optimizer.engine.memory.buffers["ema"].values())
    bad = arrays["mlp_x"][2:3].clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match="first pass is NaN or infinite"):
        run(network, optimizer, bad, arrays["mlp_y"][2:3])
    assert torch.equal(flat(network.parameters()), before[0])
    assert torch.isfinite(flat(optimizer.engine.memory.buffers["ema"].values())).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_gradient_that_is_not_finite_is_noticed_when_the_state_is_saved():
    param = nn.Parameter(torch.ones(2, device="cuda"))
    optimizer = FriendlySAM([param], lr=0.1)
    for factor in (1.0, float("nan")):
        optimizer.state_dict()
        (factor * param.square().sum()).backward()
        optimizer.first_step(zero_grad=True)
        param.square().sum().backward()
        optimizer.second_step(zero_grad=True)
    with pytest.raises(NonFiniteGradientError, match="first pass is NaN or infinite"):
        optimizer.state_dict()


def test_steps_in_the_wrong_order_are_refused(arrays):
    optimizer = ALL["sam"](mlp(arrays), **SGD)
    with pytest.raises(RuntimeError, match="second_step was called without first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="ESAM chooses samples"):
        ESAM(weight(), lr=0.1).step(lambda: None)
