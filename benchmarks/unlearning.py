"""Time and peak memory of unlearning steps against a straightforward formulation of the same update, both in turn.

Each method is a function in ``METHODS`` that returns a :class:`Comparison`: the plain side (``straightforward.py``),
ours, and a measure of how far apart their results are. A ratio is printed only where both sides computed the same. Our
network has the layout that Lethe's modules give it on a CPU; ``--layout default`` leaves it as it is.

    python benchmarks/unlearning.py --methods sfron mu_mis --network resnet20 --batch-size 64
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import platform
from collections.abc import Callable, Iterator

import straightforward as plainly
import torch
import torch.nn.functional as F
from comparing import Batch, Bench, Comparison, distances, measure, sgd
from data_pipeline import PerImage
from membership_metrics import simulate
from natmu_pairing import image_by_image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision import transforms

from torchlethe import updates
from torchlethe.components import DiagonalFisher, SaliencyMask
from torchlethe.components.sample_gradients import expected_squared_gradients
from torchlethe.data import Augmentation, InMemoryImages, PositionedLoader
from torchlethe.data.hybrids import shuffled
from torchlethe.functional.pairing import deal_partners
from torchlethe.metrics.support_vectors import svc_membership
from torchlethe.updates.base import default_optimizer


def sfron(bench: Bench) -> Comparison:
    """A cycle of SFRon: one forgetting step, five repair steps."""
    rule = bench.configured(updates.SFRonUpdate(steps=10**6, forget_every=5))
    mask = plainly.ratio_mask(copy.deepcopy(bench.start), bench.forget, bench.remain)
    optimizer, forget, remain = sgd(bench.plain), bench.forget[0], bench.remain[0]

    def plain() -> None:
        for k in range(5):
            plainly.sfron_iteration(bench.plain, optimizer, mask, None if k else forget, remain)

    batches = [{"forget": forget, "remain": remain}, *({"remain": remain} for _ in range(4))]
    # rounding may flip the mask of a weight whose ratio is at the threshold
    return bench.steps("SFRon, iteration", rule, plain, batches, target=1.3, tolerance=5e-2)


def sfron_data(bench: Bench) -> Comparison:
    """The same with its images: cropped and mirrored image by image, or in batches."""
    optimizer = sgd(bench.plain)
    mask = plainly.ratio_mask(copy.deepcopy(bench.start), bench.forget, bench.remain)
    rule = bench.configured(updates.SFRonUpdate(steps=10**6, forget_every=5))
    pixels, labels = (
        torch.randint(0, 256, (6 * bench.size, 3, 32, 32), dtype=torch.uint8),
        torch.randint(10, (6 * bench.size,)),
    )
    usual = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    per_image = DataLoader(PerImage(arrays, labels.tolist(), transforms.Compose(usual)), bench.size, shuffle=True)
    loader, augment = PositionedLoader(InMemoryImages(pixels, labels), bench.size, shuffle=True), Augmentation(crop=4)

    def usual_batches() -> Iterator[Batch]:
        for image, label in per_image:
            yield {"image": image.to(bench.device), "label": label.to(bench.device)}

    def own_batches() -> Iterator[Batch]:
        for batch in loader:
            batch = {name: value.to(bench.device) for name, value in batch.items()}
            image = augment(batch["image"], batch["index"], batch["epoch"]).float().div_(255)
            yield {"image": image, "label": batch["label"]}

    def plain() -> None:
        forget, *remain = usual_batches()
        for k in range(5):
            plainly.sfron_iteration(bench.plain, optimizer, mask, None if k else forget, remain[k])

    def ours() -> None:
        forget, *remain = own_batches()
        for k in range(5):
            rule.step(bench.ours, {"remain": remain[k]} | ({} if k else {"forget": forget}), k)

    # each side draws its own crops; that the update is the same is what the row above checks
    return Comparison("SFRon, iteration with its data", plain, ours, lambda: 0.0, target=1.3, units=5)


def sfron_preparation(bench: Bench) -> Comparison:
    """Both Fisher informations and the mask, from two batches of each role."""
    rule, seen = updates.SFRonUpdate(), {}

    def plain() -> None:
        seen["plain"] = plainly.ratio_mask(bench.plain, bench.forget, bench.remain)

    def ours() -> None:
        bench.configured(rule)

    def difference() -> float:
        pairs = [(seen["plain"][name].to(m) != m) for name, m in rule.mask.masks.items()]
        return float(torch.cat([p.flatten() for p in pairs]).float().mean())

    return Comparison("SFRon, preparation on 4 batches", plain, ours, difference)


def mu_mis(bench: Bench) -> Comparison:
    """A step of MU-Mis."""
    batch = bench.forget[0]
    bench.forget = [batch]
    options = {"monitor_every": 10**9, "monitor_samples": bench.size, "irrelevant_sampling": "fixed"}
    rule = bench.configured(updates.MUMisUpdate(steps=10**9, min_dip=1.0, **options))
    other = rule._other_classes(torch.zeros(bench.size, 10), batch["label"], batch["index"], 0).squeeze(1)
    optimizer = SGD(bench.plain.parameters(), lr=rule.optimizers[0].param_groups[0]["lr"])
    return bench.steps(
        "MU-Mis, step", rule, lambda: plainly.mu_mis_step(bench.plain, optimizer, batch, other), [batch], 1.25
    )


def fisher_per_sample(bench: Bench) -> Comparison:
    """Squared gradients of single samples."""
    seen: dict[str, list[Tensor]] = {}

    def plain() -> None:
        seen["plain"] = list(plainly.fisher(bench.plain, plainly.single_samples(bench.forget[:1])).values())

    def ours() -> None:
        seen["ours"] = list(DiagonalFisher("sample").estimate(bench.ours, bench.forget[:1]).values())

    def difference() -> float:
        return distances(*([t.cpu() for t in seen[side]] for side in ("plain", "ours")))

    return Comparison("Fisher information per sample", plain, ours, difference, target=1.5)


def fisher_forgetting(bench: Bench) -> Comparison:
    """The information of Fisher forgetting, a pass for each class."""
    seen: dict[str, list[Tensor]] = {}

    def plain() -> None:
        seen["plain"] = plainly.predicted_fisher(bench.plain, bench.remain[0])

    def ours() -> None:
        seen["ours"] = expected_squared_gradients(bench.ours, bench.remain[:1], 16)[0]

    return Comparison("Fisher forgetting, information", plain, ours, lambda: distances(seen["plain"], seen["ours"]))


def membership(bench: Bench) -> Comparison:
    """The membership metric by support vectors on one feature."""
    sets, seen = simulate(10_000, 5_000), {}

    def run(mode: str) -> None:
        seen[mode] = svc_membership(*sets, mode=mode)

    svc_membership(*(part[:100] for part in sets))  # imports
    title = "membership metric, SVC on 2 × 10 000 scores"
    return Comparison(
        title,
        lambda: run("exact"),
        lambda: run("fast"),
        lambda: abs(seen["exact"] - seen["fast"]),
        target=50,
        once=True,
    )


def natmu(bench: Bench) -> Comparison:
    """The draw of NatMU's partners, 4 hybrids of each of 500 forget images of CIFAR-10."""
    generator, seen = torch.Generator().manual_seed(0), {}
    labels = torch.randint(10, (49_500,), generator=generator)
    demand = torch.rand(500, 10, generator=generator).topk(4).indices.flatten()

    def plain() -> None:
        seen["plain"] = image_by_image(demand, labels, generator)

    def ours() -> None:
        for _ in range(20):
            seen["ours"] = deal_partners(demand, labels, lambda cards: shuffled(cards, generator))

    def difference() -> float:
        right = [torch.equal(labels[p], demand) and len(p.unique()) == len(demand) for p in seen.values()]
        return float(not all(right))

    return Comparison("NatMU, pairing of 2 000 hybrids", plain, ours, difference, target=50, repeats=20)


def random_label(bench: Bench, masked: bool = False) -> Comparison:
    """A step on random labels; the plain side gets them for nothing."""
    batch, optimizer = bench.forget[0], sgd(bench.plain)
    kind = updates.SalUnUpdate if masked else updates.RandomLabelUpdate
    rule = bench.configured(kind(optimizer=default_optimizer))
    drawn = (rule.relabel(batch, 10, k) for k in itertools.count())
    start = {name: p.detach().clone() for name, p in bench.plain.named_parameters()}
    mask: dict[str, Tensor] = {}
    if isinstance(rule, updates.SalUnUpdate) and isinstance(rule.mask, SaliencyMask):
        mask = {name: m.contiguous() for name, m in rule.mask.masks.items()}
    bench.plain.train()

    def plain() -> None:
        labels = next(drawn)
        if masked:
            plainly.salun_step(bench.plain, optimizer, batch, labels, mask, start)
        else:
            plainly.descend(bench.plain, optimizer, lambda: F.cross_entropy(bench.plain(batch["image"]), labels))

    return bench.steps("SalUn, step" if masked else "RandomLabel, step", rule, plain, [{"forget": batch}])


def salun(bench: Bench) -> Comparison:
    """A step of SalUn with a strict mask."""
    return random_label(bench, masked=True)


def simple(
    title: str, kind: str, loss: Callable[[Bench], Tensor], role: str = "remain"
) -> Callable[[Bench], Comparison]:
    """A row for a rule whose step is a loss on one batch of each role that it reads."""

    def row(bench: Bench) -> Comparison:
        forget, remain = bench.forget[0], bench.remain[0]
        batch = {"forget": forget, "remain": remain, "both": {"forget": forget, "remain": remain}}[role]
        rule = bench.configured(getattr(updates, kind)(optimizer=default_optimizer))
        optimizer, ascent = sgd(bench.plain), kind == "GradientAscentUpdate"
        bench.plain.train(not ascent)
        return bench.steps(
            title,
            rule,
            lambda: plainly.descend(bench.plain, optimizer, lambda: loss(bench), 0.1 if ascent else math.inf),
            [batch],
        )

    return row


def cross_entropy(bench: Bench, batch: Batch) -> Tensor:
    """The plain network's loss."""
    return F.cross_entropy(bench.plain(batch["image"]), batch["label"])


def scrub(bench: Bench) -> Comparison:
    """A max step and a min step of SCRUB."""
    rule = updates.SCRUBUpdate(epochs=10**6, msteps=10**6, optimizer=default_optimizer)
    rule.set_passes({"forget": 1, "remain": 1})
    bench.configured(rule)
    optimizer, teacher = sgd(bench.plain), copy.deepcopy(bench.start).eval()
    bench.plain.train()

    def loss(batch: Batch, ascend: bool) -> Tensor:
        student = bench.plain(batch["image"])
        with torch.no_grad():
            reference = teacher(batch["image"])
        away = plainly.distance(student, reference)
        return -away if ascend else 0.99 * F.cross_entropy(student, batch["label"]) + 0.001 * away

    def plain() -> None:
        for batch, ascend in ((bench.forget[0], True), (bench.remain[0], False)):
            plainly.descend(bench.plain, optimizer, lambda b=batch, a=ascend: loss(b, a))

    return bench.steps("SCRUB, step", rule, plain, [{"forget": bench.forget[0]}, {"remain": bench.remain[0]}])


def bad_teacher(bench: Bench) -> Comparison:
    """A step of bad teaching with both teachers."""
    rule = bench.configured(updates.BadTeacherUpdate(optimizer=default_optimizer))
    batch = bench.batch() | {"is_forget": torch.arange(bench.size, device=bench.device) % 2 == 0}
    good, bad, optimizer = copy.deepcopy(bench.start).eval(), copy.deepcopy(rule.incompetent), sgd(bench.plain)
    bad.to(memory_format=torch.contiguous_format)
    bench.plain.train()
    return bench.steps(
        "BadTeacher, step",
        rule,
        lambda: plainly.descend(bench.plain, optimizer, lambda: plainly.bad_teaching(bench.plain, good, bad, batch)),
        [batch],
    )


def boundary(bench: Bench) -> Comparison:
    """A step of boundary shrink."""
    rule = bench.configured(updates.BoundaryShrinkUpdate(optimizer=default_optimizer))
    original, optimizer, batch = copy.deepcopy(bench.start).eval(), sgd(bench.plain), bench.forget[0]
    bench.plain.train()

    def loss() -> Tensor:
        return F.cross_entropy(bench.plain(batch["image"]), plainly.shrunk_labels(original, batch))

    return bench.steps("Boundary shrink, step", rule, lambda: plainly.descend(bench.plain, optimizer, loss), [batch])


def edited(title: str, rule: updates.UpdateRule, plain: Callable[[Bench], None], bench: Bench) -> Comparison:
    """A row of a one-shot editor: what it measures and its edit."""

    def ours() -> None:
        bench.configured(rule).step(bench.ours, {}, 0)

    return Comparison(title, lambda: plain(bench), ours, bench.moved)


def ssd(bench: Bench) -> Comparison:
    """SSD on two batches of each role."""

    def plain(b: Bench) -> None:
        importance = [plainly.fisher(b.plain, batches) for batches in (b.forget, b.remain + b.forget)]
        device = [{name: value.to(b.device) for name, value in found.items()} for found in importance]
        plainly.dampen(b.plain, *device, alpha=1.0)

    return edited("SSD, 6 batches", updates.SSDUpdate(alpha=1.0), plain, bench)


def influence(bench: Bench) -> Comparison:
    """The published influence step on two batches of each role and one of single samples."""

    def plain(b: Bench) -> None:
        plainly.influence(b.plain, b.forget, b.remain, b.size, 1.0)

    return edited(f"Influence, {bench.size} samples", updates.InfluenceUpdate(samples=bench.size), plain, bench)


def unsir(bench: Bench) -> Comparison:
    """An impair step of UNSIR with half a batch of noise."""
    for part, shift in ((bench.forget, 0), (bench.remain, 1)):
        for batch in part:
            batch["label"] = torch.zeros_like(batch["label"]) if not shift else batch["label"].clamp_min(1)
    rule = updates.UNSIRUpdate(default_optimizer, noise_steps=2, noise_batch=bench.size // 2, impair_epochs=10**6)
    rule.set_passes({"remain": 1})
    bench.configured(rule)
    remain, optimizer = bench.remain[0], sgd(bench.plain)
    bench.plain.train()
    image, label = torch.cat([remain["image"], rule.noise]), torch.cat([remain["label"], rule.noise_labels])

    def loss() -> Tensor:
        return F.cross_entropy(bench.plain(image), label)

    return bench.steps("UNSIR, impair step", rule, lambda: plainly.descend(bench.plain, optimizer, loss), [remain])


METHODS: dict[str, Callable[[Bench], Comparison]] = {
    "sfron": sfron,
    "sfron_data": sfron_data,
    "sfron_preparation": sfron_preparation,
    "mu_mis": mu_mis,
    "fisher_per_sample": fisher_per_sample,
    "natmu": natmu,
    "membership": membership,
    "salun": salun,
    "random_label": random_label,
    "neg_grad_plus": simple(
        "NegGradPlus, step",
        "NegGradPlusUpdate",
        lambda b: 0.95 * cross_entropy(b, b.remain[0]) - 0.05 * cross_entropy(b, b.forget[0]),
        "both",
    ),
    "scrub": scrub,
    "bad_teacher": bad_teacher,
    "ssd": ssd,
    "fisher_forgetting": fisher_forgetting,
    "boundary": boundary,
    "l1_sparse": simple("L1Sparse, step", "L1SparseUpdate", lambda b: plainly.l1_loss(b.plain, b.remain[0], 5e-4)),
    "gradient_ascent": simple(
        "GradientAscent, step", "GradientAscentUpdate", lambda b: -cross_entropy(b, b.forget[0]), "forget"
    ),
    "fine_tune": simple("FineTune, step", "FineTuneUpdate", lambda b: cross_entropy(b, b.remain[0])),
    "influence": influence,
    "unsir": unsir,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--network", default="resnet20", help="name in torchlethe.models (default: resnet20)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layout", default="chosen", choices=["chosen", "default"], help="memory layout of our side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console(width=120)
    table = Table(title=f"{options.network}, batches of {options.batch_size}, layout {options.layout}")
    for column in ("", "plain", "ours", "ratio", "target (CPU)"):
        table.add_column(column, no_wrap=True)
    for name in options.methods:
        with console.status(name):
            table.add_row(*measure(METHODS[name](Bench(options)), device, options.rounds))
    console.print(table)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    console.print(
        f"{hardware}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds in turn, "
        f"{'process time' if device.type == 'cpu' else 'wall time'}, medians"
    )


if __name__ == "__main__":
    main()
