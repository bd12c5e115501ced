"""The family agrees with the official code of each method."""

import pytest
import torch

from tests.optimizers.problems import SGD, convolution, flat, golden, mlp, run
from torchlethe.optimizers import ASAM, GSAM, SAM, FriendlySAM, VaSSO

ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.05}
RUNS = {
    "fsam": lambda m: FriendlySAM(m.parameters(), rho=0.2, lmbda=0.6, **SGD),
    "fsam_sig": lambda m: FriendlySAM(m.parameters(), rho=0.2, sigma=0.7, lmbda=0.9, **SGD),
    "fsam_adapt": lambda m: FriendlySAM(m.parameters(), rho=0.5, lmbda=0.6, adaptive="w2", **SGD),
    "fsam_adamw": lambda m: FriendlySAM(m.parameters(), rho=0.2, lmbda=0.6, **ADAMW),
    "sam": lambda m: SAM(m.parameters(), rho=0.2, **SGD),
    "asam0": lambda m: ASAM(m.parameters(), rho=0.5, variant="w2", **SGD),
    "asam": lambda m: ASAM(m.named_parameters(), rho=0.5, eta=0.01, **SGD),
    "vasso": lambda m: VaSSO(m.parameters(), rho=0.2, theta=0.9, **SGD),
    "gsam": lambda m: GSAM(m.parameters(), rho=0.2, alpha=0.4, **SGD),
}


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", RUNS)
def test_mlp_runs(name, golden_dir):
    arrays = golden(golden_dir)
    network = mlp(arrays)
    optimizer = RUNS[name](network)
    averages = []

    def note(step):
        averages.append(flat(optimizer.engine.memory.buffers["ema"].values()) if f"{name}_m" in arrays else None)

    found = run(network, optimizer, arrays["mlp_x"], arrays["mlp_y"], note)
    close(torch.stack(found.weights), arrays[f"{name}_w"])
    losses = torch.tensor(found.losses, dtype=torch.float64)
    close(losses if name != "gsam" else losses[:, 0], arrays[f"{name}_loss"])
    if f"{name}_eps" in arrays:
        close(torch.stack(found.epsilons), arrays[f"{name}_eps"])
    if f"{name}_m" in arrays:
        close(torch.stack(averages), arrays[f"{name}_m"])
    if name == "fsam":
        close(flat(optimizer.state[p]["momentum_buffer"] for p in network.parameters()), arrays["fsam_buf"][-1])


def test_convolution_with_batch_norm_and_two_groups(golden_dir):
    arrays = golden(golden_dir)
    network = convolution(arrays)
    first, last = list(network.parameters())[:3], list(network.parameters())[3:]
    groups = [
        {"params": first, "lr": 0.1, "rho": 0.2, "weight_decay": 1e-3},
        {"params": last, "lr": 0.05, "rho": 0.2 / 3, "weight_decay": 0.0},
    ]
    optimizer = FriendlySAM(groups, lmbda=0.6, module=network, momentum=0.9, nesterov=True)
    norm = network[1]

    def check(step):
        close(norm.running_mean, arrays["conv_bn_mean"][step])
        close(norm.running_var, arrays["conv_bn_var"][step])
        assert int(norm.num_batches_tracked) == step + 1  # the official code counts both passes
        close(flat(optimizer.engine.memory.buffers["ema"].values()), arrays["conv_m"][step])

    found = run(network, optimizer, arrays["conv_x"], arrays["conv_y"], check)
    close(torch.stack(found.weights), arrays["conv_w"])
    close(torch.stack(found.epsilons), arrays["conv_eps"])
    close(torch.tensor(found.losses, dtype=torch.float64), arrays["conv_loss"])


def test_learning_rate_schedule(golden_dir):
    """Lightning's and torch's cosine per iteration is the official schedule."""
    arrays = golden(golden_dir)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = FriendlySAM([weight], lr=float(arrays["lr_base"]))

    def closure():
        optimizer.zero_grad()
        weight.sum().backward()
        return weight.sum()

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(arrays["lr_T"]))
    rates = []
    for _ in range(int(arrays["lr_T"]) + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(closure)
        schedule.step()
    close(torch.tensor(rates, dtype=torch.float64)[arrays["lr_step"]], arrays["lr_value"])
