"""Two gloo processes compute what one computes, for one metric of each family."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchlethe.metrics import (
    AverageGap,
    DivergenceToReference,
    MembershipLogistic,
    MembershipSVC,
    RoleAccuracy,
    Wasserstein1,
)
from torchlethe.metrics.passes import gather_rows, own_batches

SIZES = {"member": 41, "non_member": 27, "forget": 19}


def data(role):
    generator = torch.Generator().manual_seed(SIZES[role])
    logits = 2 * torch.randn(SIZES[role], 4, generator=generator)
    labels = torch.where(torch.rand(len(logits), generator=generator) < 0.6, logits.argmax(1), 0)
    return logits, labels, torch.arange(len(logits))


def share(role, rank, world):
    """What a rank's evaluation sampler hands out, with flagged duplicates at the end."""
    logits, labels, index = data(role)
    for start in range(0, len(labels), 8 * world):
        rows = torch.arange(start, min(start + 8 * world, len(labels)))
        missing = -len(rows) % world
        part = torch.cat([rows, rows[:1].expand(missing)])
        part_labels, part_index = labels[part].clone(), index[part].clone()
        part_labels[len(rows) :], part_index[len(rows) :] = -100, -1
        yield logits[part][rank::world], part_labels[rank::world], part_index[rank::world]


def results(rank, world):
    attacks = {"logistic": MembershipLogistic(), "svc": MembershipSVC("confidence", seed=3)}
    distances = {"js": DivergenceToReference("js"), "wasserstein": Wasserstein1()}
    accuracy = RoleAccuracy(tuple(SIZES))
    for role in SIZES:
        for logits, labels, index in share(role, rank, world):
            accuracy.update(logits, labels, role)
            for attack in attacks.values():
                attack.update(logits, labels, role, index)
            if role == "forget":
                for distance in distances.values():
                    distance.update(logits, logits.roll(1, dims=1), labels)
    gap = AverageGap(["test_accuracy"])
    for seed in range(rank, 4, world):
        gap.update({"test_accuracy": 90.0 + seed}, {"test_accuracy": 91.0})
    found = {name: metric.compute() for name, metric in {**attacks, **distances, "gap": gap}.items()}
    return found | accuracy.compute()


def gathered(rank, world):
    """The rows of a set of odd size through a stock sampler, a plain loader, and chunked collectives."""
    values = torch.arange(19.0)
    sampler = DistributedSampler(values, world, rank, shuffle=False)
    loaders = (DataLoader(TensorDataset(values), 4, sampler=sampler), DataLoader(TensorDataset(values), 4))

    def all_gather(tensor):
        parts = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    for loader in loaders:
        rows, forwards = [], 0
        for (batch,), positions, repeated in own_batches(loader, rank, world, count=lambda b: len(b[0])):
            forwards += 1
            assert repeated or torch.equal(batch[positions >= 0], values[positions[positions >= 0]])
            rows.append(batch[(positions >= 0) & (not repeated)])
        assert all_gather(torch.tensor(forwards)).unique().numel() == 1
        everything = gather_rows(torch.cat(rows), all_gather, keep=rank == 0, device=torch.device("cpu"), chunk=3)
        assert torch.equal(everything.sort().values, values if rank == 0 else values[:0])


def worker(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gathered(rank, 2)
    torch.save(results(rank, 2), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one(tmp_path):
    # forking spares two cold imports of torch
    method = "fork" if sys.platform == "linux" else "spawn"
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method=method)
    alone = results(0, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14, msg=name)
