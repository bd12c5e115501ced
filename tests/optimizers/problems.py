"""The two problems of golden/fsam.npz, for whatever runs a method on them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def golden(golden_dir):
    with np.load(golden_dir / "fsam.npz") as arrays:
        return {name: torch.as_tensor(arrays[name]) for name in arrays.files}


def mlp(arrays):
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    with torch.no_grad():
        for param, name in zip(network.parameters(), ("mlp_W1", "mlp_b1", "mlp_W2", "mlp_b2"), strict=True):
            param.copy_(arrays[name])
    return network


def convolution(arrays):
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for param, name in zip(network.parameters(), ("C", "bnw", "bnb", "lw", "lb"), strict=True):
            param.copy_(arrays[f"conv_{name}"])
    return network


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@dataclass
class Run:
    """What a method did to a network: weights after, perturbation of and losses in each step."""

    weights: list = field(default_factory=list)
    epsilons: list = field(default_factory=list)
    losses: list = field(default_factory=list)


def run(network, optimizer, images, labels, after_step=lambda step: None):
    """Step through the batches with ``optimizer.step(closure)``."""
    found = Run()
    for step, (image, label) in enumerate(zip(images, labels, strict=True)):
        before, losses, away = flat(network.parameters()), [], []

        def closure(image=image, label=label, before=before, losses=losses, away=away):
            optimizer.zero_grad()
            away.append(flat(network.parameters()) - before)
            loss = nn.functional.cross_entropy(network(image), label)
            loss.backward()
            losses.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == losses[0]
        found.weights.append(flat(network.parameters()))
        found.epsilons.append(away[-1])
        found.losses.append(losses)
        after_step(step)
    return found
