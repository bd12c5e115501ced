"""NatMU agrees with the official code on every array of the golden file, those of its baselines included."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_networks import tensors_under
from torchlethe.datamodules.cifar import _SUPERCLASS
from torchlethe.functional.hybrids import blend, cosine_factor, hybrid_masks
from torchlethe.functional.membership import fit_logistic, logistic_membership
from torchlethe.functional.pairing import (
    deal_partners,
    redistribute_demand,
    rejection_partners,
    walk_demand,
    wrong_classes,
)
from torchlethe.functional.summary import average_gap
from torchlethe.functional.uncertainty import entropy
from torchlethe.optimizers import WarmupDropLR, warmup_drop_factor
from torchlethe.updates import BadTeacherUpdate, NatMUUpdate, SalUnUpdate


class Numpy:
    """Shuffles as the official code does, with NumPy's global generator of that seed."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def __call__(self, values):
        return torch.from_numpy(self.state.permutation(values.numpy()))


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "natmu.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def data(golden):
    """Images by formula, divided as the official run was."""
    labels = torch.from_numpy(golden["data_labels"])
    a, b, c, d, e = golden["img_coef"].tolist()
    i, ch, h, w = torch.meshgrid(*(torch.arange(n) for n in (len(labels), 3, 32, 32)), indexing="ij")
    images = ((a * i + b * ch + c * h + d * w + (i * h * w) % e) % 256).to(torch.uint8)
    forget = torch.zeros(len(labels), dtype=torch.bool)
    forget[torch.from_numpy(golden["forget_idx"])] = True
    return {"forget": (images[forget], labels[forget]), "remain": (images[~forget], labels[~forget])}


@pytest.fixture(scope="module")
def hybrids(golden, data):
    partners = torch.from_numpy(golden["pair_retain_idx"])
    masks = hybrid_masks(float(golden["pair_delta"]), 32)
    images = data["forget"][0].repeat_interleave(4, 0)
    return blend(data["remain"][0][partners], images, masks.repeat(len(partners) // 4, 1, 1))


def test_masks_are_exact(golden):
    for number, delta in enumerate(golden["mask_deltas"].tolist()):
        for size in (32, 64):
            expected = golden[f"mask{size}"]
            if number < len(expected):
                assert torch.equal(hybrid_masks(delta, size), torch.from_numpy(expected[number])), (delta, size)


def test_the_most_probable_wrong_classes_are_demanded(golden, data):
    present = torch.ones(int(golden["num_classes"]), dtype=torch.bool)
    top = wrong_classes(torch.from_numpy(golden["forget_logits"]), data["forget"][1], present, 4)
    assert torch.equal(top.flatten(), torch.from_numpy(golden["top4"]))
    assert torch.equal(top.flatten(), torch.from_numpy(golden["pair_demand"]))


def test_the_official_draw_is_reproduced(golden, data):
    demand = torch.from_numpy(golden["pair_demand"])
    partners = rejection_partners(demand, data["remain"][1], Numpy(int(golden["pair_seed"])))
    assert torch.equal(partners, torch.from_numpy(golden["pair_retain_idx"]))
    assert torch.equal(data["remain"][1][partners], torch.from_numpy(golden["pair_labels"]))


def test_the_variant_for_hard_samples_is_reproduced(golden, data):
    labels, classes = data["remain"][1], int(golden["num_classes"])
    present = torch.ones(classes, dtype=torch.bool)
    ranking = wrong_classes(torch.from_numpy(golden["forget_logits"]), data["forget"][1], present, classes - 1)
    demand = walk_demand(ranking, torch.bincount(labels, minlength=classes), 4).flatten()
    shuffled = Numpy(int(golden["pair_seed"]))
    decks = torch.cat([shuffled((labels == number).nonzero().flatten()) for number in range(classes)])
    partners = deal_partners(demand, labels, lambda cards: decks)
    assert torch.equal(demand, torch.from_numpy(golden["difficult_labels"]))
    assert torch.equal(partners, torch.from_numpy(golden["difficult_retain_idx"]))


def test_excess_demand_is_redistributed(golden):
    classes = golden["redis_logits"].shape[1]
    labels = torch.from_numpy(golden["redis_retain_labels"])
    own = torch.from_numpy(golden["redis_forget_labels"])
    top = wrong_classes(torch.from_numpy(golden["redis_logits"]), own, torch.ones(classes, dtype=torch.bool), 4)
    assert torch.equal(top.flatten(), torch.from_numpy(golden["redis_top4"]))
    demand = redistribute_demand(top.flatten(), labels, Numpy(0), classes)
    assert torch.equal(demand, torch.from_numpy(golden["redis_demand"]))


def test_hybrids_are_exact(golden, data, hybrids):
    assert torch.equal(hybrids[:8], torch.from_numpy(golden["hybrid_first8"]))
    pixels = hybrids.long().flatten(1)
    assert torch.equal(pixels.sum(1), torch.from_numpy(golden["hybrid_sum"]))
    assert torch.equal((pixels**2).sum(1), torch.from_numpy(golden["hybrid_sqsum"]))
    assert len(hybrids) + len(data["remain"][0]) == int(golden["n_train"])


class Normalise(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def forward(self, image):
        return (image - self.mean) / self.std


def test_fine_tuning_ends_in_the_official_weights(golden, data, hybrids):
    mean, std = (torch.from_numpy(golden[f"ft_norm_{name}"]) for name in ("mean", "std"))
    network = nn.Sequential(
        Normalise(mean, std),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, int(golden["num_classes"])),
    ).double()
    network.load_state_dict(tensors_under(golden, "ft_init/"), strict=False)
    order = torch.from_numpy(golden["ft_perm"])
    images = torch.cat([data["remain"][0][:12], hybrids[:12]])[order].double() / 255
    labels = torch.cat([data["remain"][1][:12], torch.from_numpy(golden["pair_labels"])[:12]])[order]
    assert torch.equal(labels, torch.from_numpy(golden["ft_y"]))
    lr, decay = golden["ft_hp"].tolist()
    rule = NatMUUpdate(optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay))
    rule.configure(network)
    rule.set_length(6, 3)
    rates = []
    network.train()
    for k in range(6):
        rows = slice(8 * (k % 3), 8 * (k % 3) + 8)
        logs = rule.step(network, {"image": images[rows], "label": labels[rows], "is_hybrid": order[rows] >= 12}, k)
        rates.append(logs["lr"])
    np.testing.assert_allclose(rates, golden["ft_lrs"], rtol=1e-12, atol=1e-18)
    for name, value in tensors_under(golden, "ft_final/").items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


def test_the_schedule_is_the_official_one(golden):
    np.testing.assert_allclose([cosine_factor(x, 35) for x in range(35)], golden["lr_cosine_5x7"], atol=1e-15)
    expected = golden["lr_step_10x7_w2"]  # how the original and the retrained networks are trained
    np.testing.assert_allclose([warmup_drop_factor(x, 70, 14) for x in range(70)], expected, atol=1e-15)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, rates = WarmupDropLR(optimizer, steps=70, warmup=14), []
    for _ in range(70):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, 0.1 * expected, atol=1e-15)


def test_coarse_labels_are_the_official_ones(golden):
    assert torch.equal(torch.tensor(_SUPERCLASS), torch.from_numpy(golden["cifar20_of_cifar100"]))


def linear(golden, prefix):
    layer = nn.Linear(5, 4).double()
    layer.load_state_dict(
        {"weight": torch.from_numpy(golden[f"{prefix}w"]), "bias": torch.from_numpy(golden[f"{prefix}b"])}
    )
    return layer


def test_bad_teaching_by_samples_ends_in_the_official_weights(golden):
    student = linear(golden, "bt_s_")
    rule = BadTeacherUpdate(lambda p: torch.optim.SGD(p, lr=0.1), float(golden["bt_temp"]), mean="samples")
    rule.keep_original(linear(golden, "bt_t_"))
    rule.configure(student)
    rule.incompetent = linear(golden, "bt_u_")
    x, remains = torch.from_numpy(golden["bt_x"]), torch.from_numpy(golden["bt_retain_flag"])
    for k in range(4):
        rows = slice(6 * (k % 2), 6 * (k % 2) + 6)
        label = torch.zeros(6, dtype=torch.long)  # not used
        rule.step(student, {"image": x[rows], "label": label, "is_forget": ~remains[rows]}, k)
    for name in ("weight", "bias"):
        expected = torch.from_numpy(golden[f"bt_s_{name[0]}_after4"])
        torch.testing.assert_close(getattr(student, name).detach(), expected, rtol=0, atol=1e-10)


def test_salun_masks_are_the_official_ones(golden):
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()
    network.load_state_dict(tensors_under(golden, "sal_"), strict=False)
    rule = SalUnUpdate(mask_fraction=float(golden["sal_threshold"]))
    rule.configure(network)
    x, y = torch.from_numpy(golden["bt_x"]), torch.from_numpy(golden["sal_y"])
    rule.prepare(network, {"forget": [(x[:7], y[:7]), (x[7:], y[7:])]})
    for name, kept in rule.mask.masks.items():
        assert torch.equal(kept.to(torch.uint8), torch.from_numpy(golden[f"sal_mask_{name}"])), name
    assert sum(int(kept.sum()) for kept in rule.mask.masks.values()) == int(0.3 * 76)


def test_membership_and_gap_are_the_official_ones(golden):
    entropies = {name: entropy(torch.from_numpy(golden[f"mia_{name}_logits"])) for name in ("retain", "forget", "test")}
    np.testing.assert_allclose(entropies["forget"], golden["mia_forget_entropy"], rtol=1e-9)
    parts = [entropies[name] for name in ("retain", "test", "forget")]
    assert 100 * logistic_membership(*parts) == pytest.approx(float(golden["mia_percent"]), abs=1e-12)
    member = torch.arange(len(parts[0]) + len(parts[1])) < len(parts[0])
    fit = fit_logistic(torch.cat(parts[:2]), member)
    assert -fit.intercept / fit.coefficient == pytest.approx(float(golden["mia_threshold_entropy"]), rel=1e-3)
    names = ("TA", "RA", "FA", "MIA")
    ours = dict(zip(names, golden["gap_metric"].tolist(), strict=True))
    retrain = {"TA": 75.43, "RA": 99.95, "FA": 75.92, "MIA": 53.49}
    gap = average_gap(ours, retrain, names)
    assert gap == pytest.approx(float(golden["gap_value"]), abs=1e-9)
