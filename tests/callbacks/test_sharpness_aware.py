"""What a sharpness-aware step computes, and that nobody but the weights notices the second pass."""

import copy
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, SumMetric
from torchmetrics.wrappers import Running

from tests.callbacks.sharpness_runs import SGD, Foreign, by_formulas, data, fit, loader, mlp
from tests.helpers import assert_same_bits
from torchlethe.callbacks import SharpnessAware
from torchlethe.callbacks.second_pass import part_of, uncounted


def assert_close(module, net, atol=1e-12):
    for (name, ours), theirs in zip(module.net.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


METHODS = [
    ("sam", {}),
    ("fsam", {"lmbda": 0.6}),
    ("fsam", {"lmbda": 0.9, "sigma": 0.7}),
    ("vasso", {}),
    ("gsam", {}),
    ("wsam", {}),
    ("wsam", {"decoupled": False, "gamma": 0.7}),
    ("looksam", {"interval": 2}),
]


@pytest.mark.parametrize(("accumulate", "count"), [(1, 48), (2, 40)], ids=["every batch", "two and a last single one"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: "".join(map(str, [value])))
def test_a_fit_is_the_published_formula_for_every_micro_batch(method, options, accumulate, count):
    """Also clipped: once, and the gradient that is stepped with."""
    module, net = Foreign(), mlp()
    trainer = fit(
        module,
        SharpnessAware(method, rho=0.2, **options),
        loader(count=count),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.3,
    )
    by_formulas(net, method, epochs=2, count=count, rho=0.2, accumulate=accumulate, clip=0.3, **options)
    assert_close(module, net)
    steps, batches = trainer.global_step, 2 * count // 8
    assert steps == 2 * -(-count // (8 * accumulate))
    assert {name: module.hooks.count(name) for name in module.hooks} == {
        "after_backward": batches,
        "clip": steps,
        "before_step": steps,
    }


@pytest.mark.parametrize("flavour", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
@pytest.mark.parametrize("batch_form", ["tuple", "dict"])
def test_any_base_optimizer_and_form_of_batch(flavour, batch_form):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05, **flavour)

    class Rows(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return {"x": x, "y": y} if batch_form == "dict" else (x, y)

    module, net = Foreign(optimizer=adamw), mlp()
    fit(module, SharpnessAware(rho=0.2, lmbda=0.6), DataLoader(Rows(*data()), 8))
    by_formulas(net, "fsam", rho=0.2, lmbda=0.6, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05))
    assert_close(module, net)


def test_what_a_step_writes_into_its_batch_does_not_reach_the_second_pass():
    class Scaling(Foreign):
        def training_step(self, batch, batch_idx):
            batch["x"] = 3 * batch["x"]
            return super().training_step(batch, batch_idx)

    rows = [{"x": x, "y": y} for x, y in zip(*data(), strict=True)]
    tripled = [{"x": 3 * row["x"], "y": row["y"]} for row in rows]
    module, other = Scaling(), Foreign()
    fit(module, SharpnessAware("sam", rho=0.2), DataLoader(rows, 8))
    fit(other, SharpnessAware("sam", rho=0.2), DataLoader(tripled, 8))
    assert_same_bits(module.net, other.net)


def test_a_plain_tensor_and_a_dict_of_results():
    class Autoencoder(Foreign):
        def __init__(self):
            super().__init__(nn.Linear(6, 6, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            loss = (self(batch) - batch).square().mean()
            self.seen.append((self.sam_pass, loss.item()))
            return {"loss": loss, "first": batch[0]}

        def on_train_epoch_end(self):
            pass

    class Outputs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert outputs["loss"].item() == pl_module.seen[-2][1]
            assert torch.equal(outputs["first"], batch[0])

    module = Autoencoder()
    fit(module, [SharpnessAware("sam", rho=0.2), Outputs()], DataLoader(data()[0], 8))
    assert [number for number, _ in module.seen] == [1, 2] * 6
    assert all(second > first for (_, first), (_, second) in zip(module.seen[::2], module.seen[1::2], strict=True))


def test_only_the_clean_pass_is_logged_and_counted(tmp_path):
    def rows(name):
        lines = [line.split(",") for line in (tmp_path / "logs/version_0/metrics.csv").read_text().split("\n")]
        return [float(line[lines[0].index(name)]) for line in lines[1:] if line != [""] and line[lines[0].index(name)]]

    module = Foreign(mlp(batch_norm=True))
    trainer = fit(module, SharpnessAware(rho=0.2), logger=CSVLogger(tmp_path, "logs"))
    clean, perturbed = ([loss for which, loss in module.seen if which == number] for number in (1, 2))
    assert len(clean) == len(perturbed) == trainer.global_step == 6
    assert rows("loss_step") == pytest.approx(clean)
    assert rows("loss_epoch") == pytest.approx([sum(clean) / 6])
    assert rows("twice_epoch") == pytest.approx([2 * sum(clean) / 6])
    assert rows("sam/loss_perturbed") == pytest.approx(perturbed)
    assert rows("sam/sharpness") == pytest.approx([p - c for c, p in zip(clean, perturbed, strict=True)], abs=1e-6)
    assert module.counts == 48
    assert module.updates == [6, 6, 6]
    assert module.net[1].num_batches_tracked == 6
    assert not hasattr(module, "sam_pass")


def test_scores_of_a_collection_that_is_logged_itself_are_those_without_the_callback():
    """Metrics that share a state go on sharing it; counters beside states are put back as well."""

    class Logging(Foreign):
        def __init__(self):
            super().__init__()
            self.total = Running(SumMetric(), window=3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            scores = self.scores(self(x).detach(), y)
            self.total.update(float(batch_idx))
            self.log_dict({f"now/{name}": value for name, value in scores.items() if value.ndim == 0})
            for name in ("MulticlassAccuracy", "MulticlassPrecision"):
                self.log(f"epoch/{name}", self.scores[name], on_step=False, on_epoch=True)
            return nn.functional.cross_entropy(self(x), y)

        def on_train_epoch_end(self):
            self.running = self.total.compute().item()

    def frozen(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    plain, module = Logging(), Logging()
    plain.optimizer = module.optimizer = frozen
    expected = fit(plain, None, max_epochs=2).callback_metrics
    found = fit(module, SharpnessAware(rho=0.5), max_epochs=2).callback_metrics
    assert len(expected) == 4
    assert {name: found[name] for name in expected} == expected
    assert module.running == plain.running == 3 + 4 + 5


def test_states_of_metrics_are_put_back_also_lists_and_shared_ones():
    scores, (x, y) = Foreign().scores, data()
    scores.update(x[:, :4], y)
    first, second = list(scores.values(copy_state=False))[:2]
    state, value = first.tp, first.tp.clone()
    assert second.tp is state
    rows = CatMetric()
    rows.update(x[0])
    with uncounted([first, second, rows]):
        scores.update(x[:5, 1:5], y[:5])
        rows.update(x[1])
        assert not torch.equal(first.tp, value)
    assert first.tp is second.tp is state
    assert torch.equal(state, value)
    assert torch.equal(rows.compute(), x[0].float())


@pytest.mark.parametrize("freeze", ["bn", "buffers"])
def test_running_statistics_are_those_of_the_first_pass(freeze):
    """A hand loop with the statistics of clean passes; the second pass normalises with its batch too."""
    module = Foreign(mlp(batch_norm=True))
    fit(module, SharpnessAware("sam", rho=0.2, freeze=freeze))
    net = mlp(batch_norm=True)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for x, y in loader():
        nn.functional.cross_entropy(net(x), y).backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        up = copy.deepcopy(net)
        with torch.no_grad():
            for p, q in zip(up.parameters(), net.parameters(), strict=True):
                p += 0.2 * q.grad / norm
        up.zero_grad()
        nn.functional.cross_entropy(up(x), y).backward()
        for p, q in zip(net.parameters(), up.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
        optimizer.zero_grad()
    assert module.net[1].num_batches_tracked == net[1].num_batches_tracked == 6
    for ours, theirs in zip(module.net.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_sigma_zero_and_the_first_step_are_sam_and_a_tiny_radius_is_the_base_optimizer():
    def weights(callback, **trainer):
        module = Foreign()
        fit(module, callback, **trainer)
        return module.net

    assert_same_bits(weights(SharpnessAware("fsam", 0.2, sigma=0.0)), weights(SharpnessAware("sam", 0.2)))
    one = {"max_steps": 1}
    assert_same_bits(weights(SharpnessAware("fsam", 0.2), **one), weights(SharpnessAware("sam", 0.2), **one))
    assert_same_bits(weights(SharpnessAware("sam", 1e-300)), weights(None))


def by_hand(net, autocast, steps, rho=0.2, scaler=None, lmbda=0.6):
    """F-SAM as plain PyTorch would write it, with the same operations."""
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    params, ema = list(net.parameters()), None

    def gradient(x, y):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast):
            loss = nn.functional.cross_entropy(net(x), y)
        (scaler.scale(loss) if scaler else loss).backward()

    for x, y in steps:
        gradient(x, y)
        scale = scaler.get_scale() if scaler else 1.0
        d = [p.grad / scale for p in params]
        if ema is None:
            ema = [g.clone() for g in d]
        else:
            d = [g - m for g, m in zip(d, ema, strict=True)]
            ema = [m + (1 - lmbda) * g for m, g in zip(ema, d, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in d]))
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, d, strict=True):
                p.add_(g, alpha=rho / (float(norm) + 1e-12))
        gradient(x, y)
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return ema


def test_bf16_mixed_is_the_hand_loop_to_the_bit():
    batches = loader(dtype=torch.float32)
    module, net = Foreign(mlp(dtype=torch.float32)), mlp(dtype=torch.float32)
    fit(module, SharpnessAware(rho=0.2, lmbda=0.6), batches, precision="bf16-mixed")
    by_hand(net, torch.bfloat16, batches)
    assert_same_bits(module.net, net)


def half(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return scaler, MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def test_fp16_is_the_hand_loop_and_does_not_depend_on_the_loss_scale():
    batches, found = loader(dtype=torch.float32), []
    for scale in (2.0**8, 2.0**12):
        module, net = Foreign(mlp(dtype=torch.float32)), mlp(dtype=torch.float32)
        callback = SharpnessAware(rho=0.2, lmbda=0.6)
        fit(module, callback, batches, plugins=[half(scale)[1]])
        ema = by_hand(net, torch.float16, batches, scaler=half(scale)[0])
        for ours, theirs in zip(callback.engine.buffers()["ema"].values(), ema, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert_close(module, net, atol=1e-6)
        found.append(module.net)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["gsam", "wsam", "looksam"])
def test_methods_that_need_both_gradients_follow_their_formula_in_fp16(method):
    """With accumulation, so that loss scale and number of micro-batches meet."""
    batches, options = loader(dtype=torch.float32), {"interval": 2} if method == "looksam" else {}
    module, net = Foreign(mlp(dtype=torch.float32)), mlp()
    callback = SharpnessAware(method, rho=0.2, **options)
    fit(module, callback, batches, plugins=[half(2.0**10)[1]], accumulate_grad_batches=2)
    by_formulas(net, method, rho=0.2, accumulate=2, **options)
    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-3)
    assert not callback.engine.memory.buffers.get("correction")


class Overflow(Foreign):
    """The loss of one pass of one step does not fit into fp16."""

    def __init__(self, which):
        super().__init__(mlp(dtype=torch.float32))
        self.which = which

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e36 if (batch_idx, self.sam_pass) == self.which else loss


class Record(Callback):
    """Weights and averages after every batch."""

    def __init__(self, callback, name):
        self.callback, self.name, self.rows = callback, name, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        buffers = self.callback.engine.buffers().get(self.name, {})
        self.rows.append([copy.deepcopy(pl_module.net.state_dict()), [v.clone() for v in buffers.values()]])


@pytest.mark.parametrize("which", [1, 2], ids=["first pass", "second pass"])
@pytest.mark.parametrize(
    ("method", "buffer"), [("fsam", "ema"), ("looksam", "component"), ("wsam", "none"), ("gsam", "none")]
)
def test_an_overflow_of_fp16_skips_the_step_and_spoils_nothing(method, buffer, which):
    scaler, plugin = half(2.0**12)
    module = Overflow((3, which))
    callback = SharpnessAware(method, rho=0.2, **({"interval": 1} if method == "looksam" else {}))
    record = Record(callback, buffer)
    fit(module, [callback, record], loader(dtype=torch.float32), plugins=[plugin])
    assert scaler.get_scale() == 2.0**11
    assert_same_bits(record.rows[3][0], record.rows[2][0])
    if (method, which) != ("fsam", 2):  # F-SAM's first pass was good then
        for before, after in zip(record.rows[2][1], record.rows[3][1], strict=True):
            assert torch.equal(before, after)
    assert [number for number, _ in module.seen] == [1, 2] * 3 + ([1, 2] if which == 2 else [1]) + [1, 2] * 2
    assert all(torch.isfinite(value).all() for value in module.net.state_dict().values())
    if (method, which) != ("fsam", 2):
        # the skipped step leaves no trace: the same as without its batch
        x, y = (torch.cat([part[:24], part[32:]]) for part in data(dtype=torch.float32))
        without = Foreign(mlp(dtype=torch.float32))
        callback = SharpnessAware(method, rho=0.2, **({"interval": 1} if method == "looksam" else {}))
        fit(without, callback, DataLoader(TensorDataset(x, y), 8), plugins=[half(2.0**12)[1]])
        assert_close(module, without.net, atol=1e-4)


def test_a_skipped_step_drops_what_its_earlier_micro_batch_left_for_after_it():
    def run(module, rows):
        callback, (_, plugin) = SharpnessAware("wsam", rho=0.2), half(2.0**12)
        fit(module, callback, DataLoader(rows, 8), plugins=[plugin], accumulate_grad_batches=2)
        return module

    x, y = data(dtype=torch.float32)
    found = run(Overflow((3, 1)), TensorDataset(x, y))
    x, y = (torch.cat([part[:16], part[32:]]) for part in (x, y))
    assert_close(found, run(Foreign(mlp(dtype=torch.float32)), TensorDataset(x, y)).net, atol=1e-4)


def test_dropout_draws_anew_in_the_second_pass_unless_asked_to_replay():
    class Masks(Foreign):
        def __init__(self):
            super().__init__(mlp(dropout=0.5))
            self.masks = []

        def training_step(self, batch, batch_idx):
            self.masks.append((self.net[1](torch.ones(64, dtype=torch.float64)) > 0).clone())
            return super().training_step(batch, batch_idx)

    for replay, same in ((False, 0), (True, 6)):
        torch.manual_seed(0)
        module = Masks()
        fit(module, SharpnessAware("sam", rho=0.2, replay_rng=replay))
        pairs = zip(module.masks[::2], module.masks[1::2], strict=True)
        assert sum(bool(torch.equal(a, b)) for a, b in pairs) == same
        assert not torch.equal(module.masks[0], module.masks[2])


class Operations(TorchDispatchMode):
    """Count what is dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sam", "fsam", "vasso"])
def test_a_step_costs_a_handful_of_operations_beside_its_two_passes(method):
    def network():
        return nn.Sequential(*[nn.Linear(6, 6) for _ in range(33)])

    class Bare(Foreign):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_epoch_end(self):
            pass

    def operations(callback, steps):
        batches, module = loader(dtype=torch.float32), Bare(network())
        del module.scores  # whose states are kept as well
        with Operations() as counted:
            fit(module, callback, batches, max_steps=steps, log_every_n_steps=50)
        return counted.count

    def a_step(*callbacks):
        return operations([make() for make in callbacks], 5) - operations([make() for make in callbacks], 4)

    net, (x, y) = network(), next(iter(loader(dtype=torch.float32)))
    with Operations() as one_pass:
        (nn.functional.cross_entropy(net(x), y) / 1).backward()
    beside = a_step(lambda: SharpnessAware(method, rho=0.2)) - a_step() - one_pass.count
    assert 0 < beside <= 15


@pytest.mark.parametrize(("method", "accumulate"), [("sam", 1), ("fsam", 2)])
def test_the_second_pass_has_the_memory_of_the_first_gradient(method, accumulate):
    class Watching(Foreign):
        def on_train_start(self):
            for param in self.net.parameters():
                param.register_post_accumulate_grad_hook(self.note)

        def note(self, param):
            if self.sam_pass == 1:
                self.first.append(weakref.ref(param.grad))

        def training_step(self, batch, batch_idx):
            if self.sam_pass == 2:
                self.alive.append(sum(reference() is not None for reference in self.first))
            else:
                self.first = []
            return super().training_step(batch, batch_idx)

    module = Watching()
    module.alive = []
    fit(module, SharpnessAware(method, rho=0.2), accumulate_grad_batches=accumulate)
    assert len(module.first) == 4
    assert module.alive == [0] * 6


@pytest.mark.parametrize("method", ["fsam", "esam"])
def test_a_batch_is_let_go_when_its_step_is_over(method):
    class Batches(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.alive.append(sum(reference() is not None for reference in self.seen))
            self.seen.append(weakref.ref(batch[0]))

    batches = Batches()
    batches.seen, batches.alive = [], []
    fit(Foreign(), [batches, SharpnessAware(method, rho=0.2)])
    assert batches.alive == [0] * 6


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fsam", "vasso"])
def test_averages_follow_in_the_steps_between_and_before(method):
    module, net = Foreign(), mlp()
    fit(module, SharpnessAware(method, rho=0.2, interval=3, warmup_steps=4), max_epochs=2)
    formulas = by_formulas(net, method, epochs=2, rho=0.2, interval=3, warmup=4)
    assert_close(module, net)
    assert [number for number, _ in module.seen].count(2) == 3
    assert [step for step, (_, second) in enumerate(formulas.losses) if second is not None] == [4, 7, 10]


def test_methods_without_memory_leave_the_steps_between_to_the_base_optimizer():
    module, net = Foreign(), mlp()
    fit(module, SharpnessAware("sam", rho=0.2, interval=2), accumulate_grad_batches=2)
    by_formulas(net, "sam", rho=0.2, interval=2, accumulate=2)
    assert_close(module, net)
    assert [number for number, _ in module.seen] == [1, 2] * 2 + [1] * 2 + [1, 2] * 2


class Radii(Callback):
    """How far each parameter is moved, by name."""

    def setup(self, trainer, pl_module, stage):
        self.found, self.trainer, self.module = {}, trainer, pl_module
        pl_module.net.register_forward_pre_hook(self.look)

    def look(self, net, inputs):
        if self.module.sam_pass == 1:
            self.before = {name: p.detach().clone() for name, p in net.named_parameters()}
        else:
            batch = self.trainer.fit_loop.total_batch_idx
            self.found[batch] = {n: (p.detach() - self.before[n]).norm().item() for n, p in net.named_parameters()}

    @property
    def moves(self):
        return list(self.found.values())

    def totals(self):
        return [sum(value**2 for value in move.values()) ** 0.5 for move in self.moves]


def test_schedules_of_the_radius():
    radii = Radii()
    fit(Foreign(), [SharpnessAware("sam", 0.3, rho_schedule="linear", rho_end=0.1), radii], max_epochs=2)
    assert radii.totals() == pytest.approx([0.3 - 0.2 * step / 12 for step in range(12)], abs=1e-9)

    class Cosine(Foreign):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def training_step(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    radii, rates = Radii(), []
    trainer = fit(Cosine(), [SharpnessAware("sam", 0.3, rho_schedule="lr"), radii], max_epochs=2)
    assert radii.totals() == pytest.approx([3 * rate for rate in rates[::2]], abs=1e-9)
    assert rates[::2] == rates[1::2]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 12
    assert float(trainer.callback_metrics["sam/rho"]) == pytest.approx(3 * rates[-1])


def test_every_group_has_its_radius_and_all_share_one_norm():
    def groups(parameters):
        first, second = list(parameters)[:2], list(parameters)[2:]
        return torch.optim.SGD([{"params": first, "rho": 0.4}, {"params": second}], lr=0.1)

    module, radii = Foreign(), Radii()
    module.optimizer = lambda parameters: groups(list(parameters))
    fit(module, [SharpnessAware("sam", 0.2), radii], max_steps=1)
    net, (x, y) = mlp(), next(iter(loader()))
    grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
    total = torch.cat([g.flatten() for g in grads]).norm()
    expected = [rho * (g.norm() / total).item() for g, rho in zip(grads, (0.4, 0.4, 0.2, 0.2), strict=True)]
    assert list(radii.moves[0].values()) == pytest.approx(expected, abs=1e-12)


def test_layerwise_gives_every_tensor_the_radius():
    radii = Radii()
    fit(Foreign(), [SharpnessAware("fsam", 0.2, norm="layerwise"), radii])
    assert [value for move in radii.moves for value in move.values()] == pytest.approx([0.2] * 24, abs=1e-9)


def test_only_the_chosen_parameters_move_and_the_others_get_their_gradient_all_the_same():
    module, net, radii = Foreign(), mlp(), Radii()
    fit(module, [SharpnessAware("fsam", 0.2, lmbda=0.6, perturb=r"^net\.2\."), radii], accumulate_grad_batches=2)
    by_formulas(net, "fsam", rho=0.2, lmbda=0.6, accumulate=2, moved=lambda name: name.startswith("2."))
    assert_close(module, net)
    assert all(move["0.weight"] == move["0.bias"] == 0 < move["2.bias"] for move in radii.moves)

    module, radii = Foreign(mlp(batch_norm=True)), Radii()
    fit(module, [SharpnessAware("sam", 0.5, perturb="norm_only"), radii])
    assert [sorted(name for name, value in move.items() if value) for move in radii.moves] == [
        ["1.bias", "1.weight"]
    ] * 6
    assert all(param.requires_grad for param in module.parameters())


@pytest.mark.parametrize("method", ["gsam", "wsam", "looksam"])
def test_a_partial_climb_of_methods_that_use_both_gradients(method):
    module, net = Foreign(), mlp()
    fit(module, SharpnessAware(method, 0.2, perturb="weight"))
    by_formulas(net, method, rho=0.2, moved=lambda n: "weight" in n, **({"interval": 5} if method == "looksam" else {}))
    assert_close(module, net)


def test_a_full_batch_has_no_noise_to_climb_along():
    """What is left of its gradient without the average is tiny, and published F-SAM blows it up to the radius."""

    def still(parameters):
        return torch.optim.SGD(parameters, lr=1e-5)

    for ratio, expected in ((0.0, [0.2, 0.2, 0.2]), (1e-3, [0.2, 0.0, 0.0])):
        radii = Radii()
        fit(Foreign(optimizer=still), [SharpnessAware(rho=0.2, min_noise_ratio=ratio), radii], loader(48), max_epochs=3)
        assert radii.totals() == pytest.approx(expected, abs=1e-6)


def test_a_share_of_the_batch_gives_the_direction():
    class Sizes(Foreign):
        def loss(self, batch):
            sizes.append(len(batch[1]))
            return super().loss(batch)

    module, net, sizes = Sizes(), mlp(), []
    trainer = fit(module, SharpnessAware("sam", 0.2, ascent_fraction=0.5))
    assert sizes == [4, 8] * 6
    assert "sam/sharpness" not in trainer.callback_metrics
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for x, y in loader():
        params = list(net.parameters())
        first = torch.autograd.grad(nn.functional.cross_entropy(net(x[:4]), y[:4]), params)
        norm = torch.cat([g.flatten() for g in first]).norm()
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p += 0.2 * g / norm
        second = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), params)
        with torch.no_grad():
            for p, w, g in zip(params, before, second, strict=True):
                p.copy_(w)
                p.grad = g
        optimizer.step()
    assert_close(module, net)


def test_memory_in_another_dtype():
    callback = SharpnessAware("fsam", 0.2, lmbda=0.6, memory_dtype="bfloat16")
    module, exact = Foreign(), mlp()
    fit(module, callback)
    by_formulas(exact, "fsam", rho=0.2, lmbda=0.6)
    assert {value.dtype for value in callback.engine.buffers()["ema"].values()} == {torch.bfloat16}
    assert_close(module, exact, atol=5e-3)


def test_esam_takes_the_samples_whose_loss_rises_most_and_draws_tensors_by_seed_and_step():
    class Samples(Foreign):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                losses = nn.functional.cross_entropy(self.net(self.all[0]), self.all[1], reduction="none")
            self.kept.append((losses, batch[0].clone()))
            return super().training_step(batch, batch_idx)

    def run(seed, **options):
        module, radii = Samples(), Radii()
        module.all, module.kept = data(), []
        fit(module, [SharpnessAware("esam", 0.5, seed=seed, **options), radii])
        return module, [tuple(value > 0 for value in move.values()) for move in radii.moves]

    module, moved = run(0)
    for step in range(6):
        (clean, whole), (perturbed, part) = module.kept[2 * step : 2 * step + 2]
        rise = (perturbed - clean)[8 * step : 8 * step + 8]
        chosen = whole[rise.topk(4).indices]
        assert torch.equal(part, chosen)
    assert moved == run(0)[1]
    assert moved != run(1)[1]
    assert 0.3 < sum(map(sum, moved)) / 24 < 0.9
    # all samples and tensors: SAM
    plain, other = run(0, beta=1.0, gamma=1.0)[0], Samples()
    other.all, other.kept = data(), []
    fit(other, SharpnessAware("sam", 0.5))
    assert_same_bits(plain.net, other.net)


def test_esam_may_draw_nothing_but_parameters_without_gradient():
    """Then its second pass is at w."""
    module, radii = Foreign(), Radii()
    module.unused = nn.Linear(2, 2, dtype=torch.float64)
    fit(module, [SharpnessAware("esam", 0.2, beta=0.1, gamma=1.0), radii], max_epochs=2)
    assert [number for number, _ in module.seen] == [1, 2] * 12
    still = [total for total in radii.totals() if total == 0]
    assert 0 < len(still) < 12
    assert [total for total in radii.totals() if total] == pytest.approx([0.2 / 0.1] * (12 - len(still)))


def test_esam_with_losses_of_its_own():
    class NoForward(Foreign):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch["y"]))
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

        def on_train_epoch_end(self):
            pass

    def losses(pl_module, batch):
        return nn.functional.cross_entropy(pl_module.net(batch["x"]), batch["y"], reduction="none")

    rows, sizes = [{"x": x, "y": y} for x, y in zip(*data(), strict=True)], []
    fit(NoForward(), SharpnessAware("esam", 0.2, gamma=0.25, sample_losses=losses), DataLoader(rows, 8))
    assert sizes == [8, 2] * 6


def test_a_part_of_a_batch_keeps_its_form():
    batch = {"x": torch.arange(3), "meta": ["a", "b", "c"], "pair": (torch.eye(3), [torch.arange(3)]), "scale": 2.0}
    part = part_of(batch, torch.tensor([2, 0]))
    assert part["x"].tolist() == [2, 0]
    assert part["meta"] == ["c", "a"]
    assert part["scale"] == 2.0
    assert isinstance(part["pair"], tuple)
    assert part["pair"][1][0].tolist() == [2, 0]
    assert part_of(batch, slice(1))["meta"] == ["a"]
    with pytest.raises(ValueError, match=r"^the tensors of a batch have 2 different first dimensions.*ascent_fraction"):
        part_of({"x": torch.arange(3), "y": torch.arange(2)}, slice(1))
