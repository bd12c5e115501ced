"""Speed and memory of self-ensemble protection against the straightforward formulation, in turn, same bytes out.

The straightforward formulation is that of the official scripts: every gradient reads its checkpoint's file (with the
optimizer's state) into the network, goes through the data loader from the first batch to the one to be protected, and
differentiates in float arithmetic through a network whose parameters take gradients; class means are measured anew for
each chunk of images. Usage:

    python benchmarks/protection.py                      # CPU: ResNet-8, 128 images in 4 chunks
    python benchmarks/protection.py --device cuda        # ResNet-18, 8192 images in 4 chunks
    python benchmarks/protection.py --vectorised         # small networks on digits: one by one against vectorised
    python benchmarks/protection.py --memory             # peak memory against the number of checkpoints
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from torchlethe.components.checkpoint_folder import Checkpoint, write_list
from torchlethe.io import file_hash, save_weights
from torchlethe.models import MLP, SmallCNN, features_and_logits, normalized, resnet8, resnet18
from torchlethe.updates.protection import SelfEnsembleProtector

CLASSES = 10


class Decoded(Dataset):
    """Images that are decoded one by one, as torchvision's CIFAR-10 does."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return to_tensor(Image.fromarray(self.images[i])), int(self.labels[i])


def make_ensemble(network: nn.Module, count: int, folder: Path) -> list[Path]:
    """Random checkpoints of a network, as the official script stores them and as CheckpointEnsemble does."""
    files, entries = [], []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        momentum = {i: torch.zeros_like(p) for i, p in enumerate(network.parameters())}
        files.append(folder / f"official-{k}.pt")
        torch.save({"net": network.state_dict(), "optimizer": momentum}, files[-1])
        path = save_weights(network, folder / f"epoch-{k:04d}.safetensors")
        entries.append(Checkpoint(path.name, k, k, file_hash(path)))
    write_list(folder, entries, complete=True)
    return files


def straightforward(
    network: nn.Module,
    files: list[Path],
    images: Tensor,
    labels: Tensor,
    variant: str,
    chunk: int,
    steps: int,
    radius: int,
) -> Tensor:
    """The official procedure (with the fixes that SEP-FA documents), for all chunks."""
    device = next(network.parameters()).device
    loader = DataLoader(Decoded(images, labels), batch_size=chunk)
    results = []
    for job in range(len(loader)):
        means: dict[int, Tensor] = {}
        x = clean = None
        for _ in range(steps):
            total: list[Tensor] = []
            for k, file in enumerate(files):
                network.load_state_dict(torch.load(file, map_location=device, weights_only=True)["net"])
                network.eval()
                if variant == "sep_fa" and k not in means:
                    features, seen = [], []
                    with torch.no_grad():
                        for image, label in loader:
                            features.append(features_and_logits(network, image.to(device))[0].cpu())
                            seen.append(label)
                    rows, owner = torch.cat(features).double(), torch.cat(seen)
                    means[k] = torch.stack([rows[owner == c].mean(0) for c in range(CLASSES)]).float().to(device)
                image, label = next(batch for number, batch in enumerate(loader) if number == job)
                if clean is None:
                    x = clean = image.to(device)
                target = ((label + CLASSES // 2) % CLASSES).to(device)
                inputs = x.clone().requires_grad_(True)
                features_k, logits = features_and_logits(network, inputs)
                if variant == "sep":
                    loss = nn.functional.cross_entropy(logits, target)
                else:
                    loss = nn.functional.mse_loss(features_k, means[k][target])
                loss.backward()
                total.append(inputs.grad.cpu())
            direction = torch.stack(total).mean(0).sign().to(device)
            x = (x - direction / 255).clamp(clean - radius / 255, clean + radius / 255).clamp(0, 1)
        results.append((x * 255).round().to(torch.uint8).cpu())
    return torch.cat(results)


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result: on a GPU of the clock, on the CPU of one thread's work, whatever else the machine does."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def compare(device: str, repeats: int) -> None:
    """Images per second of both sides, in turn."""
    gpu = device == "cuda"
    count, chunk, checkpoints, steps, radius = (8192, 2048, 8, 5, 8) if gpu else (128, 32, 3, 3, 8)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    with tempfile.TemporaryDirectory() as name:
        network = normalized(resnet18() if gpu else resnet8(), "cifar10")
        files = make_ensemble(network, checkpoints, Path(name))
        network.to(device)

        def ours(variant: str, resident: bool, half: bool = False) -> Tensor:
            rule = SelfEnsembleProtector(
                network, CLASSES, name, variant, radius, 1, steps, checkpoints, resident=resident, notes=False
            )
            index = torch.arange(count)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                data = [
                    {"image": i.to(device), "label": y.to(device), "index": n}
                    for i, y, n in zip(images.split(chunk), labels.split(chunk), index.split(chunk), strict=True)
                ]
                rule.prepare(data, device=device)
                return torch.cat([rule.protect(**batch) for batch in data]).cpu()

        for variant in ("sep", "sep_fa"):
            sides = {
                "straightforward": lambda v=variant: straightforward(
                    network, files, images, labels, v, chunk, steps, radius
                ),
                "streamed": lambda v=variant: ours(v, False),
                "resident": lambda v=variant: ours(v, True),
            }
            if gpu:
                sides["resident, bf16"] = lambda v=variant: ours(v, True, True)
            times: dict[str, list[float]] = {title: [] for title in sides}
            outcome: dict[str, Tensor] = {}
            for _ in range(repeats):
                for title, side in sides.items():
                    seconds, outcome[title] = timed(side)
                    times[title].append(seconds)
            base = outcome["straightforward"]
            for title, seconds_of in times.items():
                middle = statistics.median(seconds_of)
                ratio = statistics.median(times["straightforward"]) / middle
                same = (outcome[title] == base).double().mean().item()
                gradients = count * checkpoints * steps / middle
                print(
                    f"{variant:7} {title:16} {count / middle:8.1f} images/s {gradients:9.0f} gradients/s "
                    f"{ratio:6.2f}×  equal bytes {same:.4%}",
                    flush=True,
                )


def vectorised(device: str, repeats: int) -> None:
    """One by one against vectorised, on small networks and batches."""
    for pooled, batch in ((True, 16), (True, 64), (True, 300), (False, 64), (False, 300)):
        torch.manual_seed(0)
        network = SmallCNN(pooled=pooled)
        images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8)
        labels = torch.arange(300) % CLASSES
        with tempfile.TemporaryDirectory() as name:
            make_ensemble(network, 5, Path(name))
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(repeats):
                for joined in (False, True):
                    rule = SelfEnsembleProtector(
                        network, CLASSES, name, "sep", 32, 4, 5, 5, resident=True, vectorised=joined, notes=False
                    )
                    rule.prepare([], device=device)
                    parts = list(zip(images.split(batch), labels.split(batch), strict=True))
                    rule.protect(parts[0][0].to(device), parts[0][1].to(device), labels)
                    seconds, _ = timed(
                        lambda rule=rule, parts=parts: torch.cat(
                            [rule.protect(i.to(device), y.to(device), y) for i, y in parts]
                        )
                    )
                    times[joined].append(seconds)
            one, all_ = (300 / statistics.median(times[joined]) for joined in (False, True))
            print(
                f"SmallCNN(pooled={pooled}), batch {batch:4}: one by one {one:8.0f}, vectorised {all_:8.0f} images/s",
                flush=True,
            )


def memory_network(device: str) -> tuple[str, nn.Module]:
    """Name and network: on the CPU one with much memory and little work."""
    if device == "cuda":
        return "ResNet-18", normalized(resnet18(), "cifar10")
    return "an MLP (24.1 MiB each)", normalized(MLP(CLASSES, 3, 32, hidden=(2048, 8)), "cifar10")


def memory(device: str) -> None:
    """Peak memory in processes of their own."""
    for resident in (False, True):
        for count in (2, 8, 16):
            words = [sys.executable, __file__, "--device", device, "--peak", str(count)]
            done = subprocess.run(words + ["--resident"] * resident, capture_output=True, text=True, check=True)
            kind = "resident" if resident else "streamed"
            print(f"{kind} {count:3} checkpoints of {memory_network(device)[0]}: {done.stdout.strip()}", flush=True)


def peak(device: str, count: int, resident: bool) -> None:
    """What one process needs at most."""
    network = memory_network(device)[1]
    with tempfile.TemporaryDirectory() as name:
        make_ensemble(network, count, Path(name))
        rule = SelfEnsembleProtector(network, CLASSES, name, "sep", 8, 1, 2, count, resident=resident, notes=False)
        rule.prepare([], device=device)
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, device=device)
        rule.protect(images, torch.arange(8, device=device), torch.arange(8))
        if device == "cuda":
            print(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device")
        else:
            print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB resident set")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vectorised", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.peak:
        peak(options.device, options.peak, options.resident)
    elif options.memory:
        memory(options.device)
    elif options.vectorised:
        vectorised(options.device, options.repeats)
    else:
        compare(options.device, options.repeats)


if __name__ == "__main__":
    main()
