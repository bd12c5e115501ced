"""The straightforward formulations that ``benchmarks/unlearning.py`` compares with: what published loops do.

They go parameter by parameter, copy the network where the published code does, and read gradients one sample or one
class at a time. Nothing is made slower than there; what costs nothing is left out (printing, evaluation, files).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = dict[str, Tensor]
Named = dict[str, Tensor]


def gradients(network: nn.Module, loss: Tensor) -> None:
    """Fresh gradients."""
    network.zero_grad()
    loss.backward()


def fisher(network: nn.Module, batches: Iterable[Batch]) -> Named:
    """Mean squared batch gradients, moved to the CPU parameter by parameter (SFRon, SSD)."""
    network.eval()
    found = {name: torch.zeros_like(p, device="cpu") for name, p in network.named_parameters()}
    count = 0
    for batch in batches:
        gradients(network, F.cross_entropy(network(batch["image"]), batch["label"]))
        for name, p in network.named_parameters():
            found[name] += (p.grad**2).cpu()
        count += 1
    return {name: value / count for name, value in found.items()}


def ratio_mask(network: nn.Module, forget: list[Batch], remain: list[Batch], gamma: float = 1.0) -> Named:
    """SFRon's mask."""
    f, r = fisher(network, forget), fisher(network, remain)
    return {name: ((f[name] + 1e-15) / (r[name] + 1e-15) >= gamma).float() for name in f}


def sfron_iteration(
    network: nn.Module,
    optimizer: Optimizer,
    mask: Named,
    forget: Batch | None,
    remain: Batch,
    progress: float = 0.0,
    alpha: float = 25.0,
) -> None:
    """One iteration, with a copy of the network for a slow update that is switched off."""
    previous = copy.deepcopy(network)
    factor = (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * factor
    network.train()
    if forget is not None:
        losses = F.cross_entropy(network(forget["image"]), forget["label"], reduction="none")
        weights = 1 / (losses.detach().clamp_min(1e-6) ** 0.5 + 1e-15)
        gradients(network, -alpha * factor * (weights / weights.sum() * losses).sum())
        for name, p in network.named_parameters():
            p.grad *= mask[name].to(p.device)
        nn.utils.clip_grad_norm_(network.parameters(), 7.0)
        optimizer.step()
    gradients(network, F.cross_entropy(network(remain["image"]), remain["label"]))
    optimizer.step()
    with torch.no_grad():
        for p, old in zip(network.parameters(), previous.parameters(), strict=True):
            p.copy_(1.0 * p + 0.0 * old)


def mu_mis_step(network: nn.Module, optimizer: Optimizer, batch: Batch, other: Tensor) -> None:
    """Two input gradients with a graph, then backward through both; BatchNorm in eval mode."""
    network.eval()
    image = batch["image"].clone().requires_grad_()
    logits = network(image)
    rows = torch.arange(len(image), device=image.device)
    target, irrelevant = (logits[rows, classes].sum() for classes in (batch["label"], other))
    (g1,) = torch.autograd.grad(target, image, create_graph=True, retain_graph=True)
    (g2,) = torch.autograd.grad(irrelevant, image, create_graph=True)
    gradients(network, ((g1**2).sum() - (g2**2).sum()) / len(image))
    optimizer.step()


def single_samples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of size one."""
    for batch in batches:
        for image, label in zip(batch["image"].split(1), batch["label"].split(1), strict=True):
            yield {"image": image, "label": label}


def predicted_fisher(network: nn.Module, batch: Batch, classes: int = 10) -> list[Tensor]:
    """Fisher forgetting's information (``fisher_new``): one backward pass for each class."""
    network.eval()
    logits = network(batch["image"])
    probability = F.softmax(logits, 1).detach()
    found = [torch.zeros_like(p) for p in network.parameters()]
    for y in range(classes):
        loss = F.cross_entropy(logits, torch.full_like(batch["label"], y))
        network.zero_grad()
        loss.backward(retain_graph=True)
        for value, p in zip(found, network.parameters(), strict=True):
            value += probability[:, y].mean() * p.grad**2
    return found


def descend(network: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor], clip: float = math.inf) -> None:
    """A plain step on a loss."""
    gradients(network, loss())
    if clip < math.inf:
        nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()


def salun_step(
    network: nn.Module, optimizer: Optimizer, batch: Batch, labels: Tensor, mask: Named, start: Named
) -> None:
    """A random-label step on the masked gradient; masked weights and their momentum put back one by one."""
    gradients(network, F.cross_entropy(network(batch["image"]), labels))
    for name, p in network.named_parameters():
        p.grad *= mask[name]
    optimizer.step()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.data[mask[name] == 0] = start[name][mask[name] == 0]
            optimizer.state[p]["momentum_buffer"][mask[name] == 0] = 0


def l1_loss(network: nn.Module, batch: Batch, alpha: float) -> Tensor:
    """Cross-entropy and the norm of all weights, joined into one vector."""
    loss = F.cross_entropy(network(batch["image"]), batch["label"])
    return loss + alpha * torch.linalg.norm(torch.cat([p.view(-1) for p in network.parameters()]), ord=1)


def distance(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """SCRUB's divergence."""
    p_s, p_t = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(p_s, p_t, reduction="sum") * temperature**2 / len(student)


def bad_teaching(network: nn.Module, good: nn.Module, bad: nn.Module, batch: Batch) -> Tensor:
    """Both teachers see the whole batch; each sample follows one of them."""
    flags = batch["is_forget"].float().unsqueeze(1)
    with torch.no_grad():
        right, wrong = F.softmax(good(batch["image"]), 1), F.softmax(bad(batch["image"]), 1)
    return F.kl_div(F.log_softmax(network(batch["image"]), 1), flags * wrong + (1 - flags) * right)


def shrunk_labels(original: nn.Module, batch: Batch, epsilon: float = 0.1) -> Tensor:
    """The classes across the nearest boundary by a signed-gradient step."""
    image = batch["image"].clone().requires_grad_()
    original.zero_grad()
    F.cross_entropy(original(image), batch["label"]).backward()
    moved = torch.round((image.detach() + epsilon * image.grad.sign()).clamp(0, 1) * 255) / 255
    with torch.no_grad():
        return original(moved).argmax(1)


def dampen(network: nn.Module, forget: Named, full: Named, alpha: float = 10.0, lam: float = 1.0) -> None:
    """SSD's edit, parameter by parameter with boolean indices."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            chosen = forget[name] > alpha * full[name]
            factor = (lam * full[name] / forget[name])[chosen].clamp(max=1.0)
            p[chosen] = p[chosen] * factor


def influence(network: nn.Module, forget: list[Batch], remain: list[Batch], samples: int, alpha: float) -> None:
    """The published "WoodFisher" step: a backward pass for each of ``samples`` remaining samples."""
    network.eval()
    parameters = list(network.parameters())

    def gradient(batch: Batch, reduction: str = "mean") -> Tensor:
        loss = F.cross_entropy(network(batch["image"]), batch["label"], reduction=reduction)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    sizes = [sum(len(batch["label"]) for batch in batches) for batches in (forget, remain)]
    means = [
        sum(gradient(batch, "sum") for batch in batches) / size
        for batches, size in zip((forget, remain), sizes, strict=True)
    ]
    k = sizes[0] / sum(sizes) * (means[0] - means[1])
    o = None
    for number, batch in enumerate(single_samples(remain)):
        if number >= samples:
            break
        g = gradient(batch)
        if o is None:
            o = g
            continue
        a = torch.dot(o, g)
        k = k - torch.dot(k, g) / (1000 + a) * o
        o = o - a / (1000 + a) * o
    with torch.no_grad():
        for p, part in zip(parameters, k.split([p.numel() for p in parameters]), strict=True):
            p += alpha * part.view_as(p)
