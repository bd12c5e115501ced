"""How far perturbations carry: crafted on one network, tried on all, as a table and a heat map."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import nn

from torchlethe.callbacks.run_folder import run_folder
from torchlethe.components.perturbation_file import load_perturbation
from torchlethe.components.split_network import logits_of
from torchlethe.data import model_input
from torchlethe.functional.universal import perturbed
from torchlethe.io import atomic_write, load_weights
from torchlethe.metrics import FoolingRatio


class TransferMatrix(Callback):
    """Try every perturbation on every network, on the data of a test: rows are sources, columns are targets.

    Works beside any module that is tested. Each batch passes through a network once as it is and once for each
    perturbation: M² + M passes for M of both. Writes ``transfer.csv``, ``transfer.json`` and ``transfer.png`` into the
    run's folder and logs ``transfer/<source>/<target>``; all numbers are fooling ratios, the share of predictions that
    change, in percent.

    Args:
        perturbations: file of each source by name, see
            :func:`~torchlethe.components.perturbation_file.load_perturbation`.
        networks: the targets by name.
        weights: weight file of each target by name, for those whose weights are not loaded yet.
        clamp: whether perturbed images are clamped to [0, 1].
        filename: name of the files, without suffix.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: nothing to compare, a name of ``weights`` is no network, or perturbations and images differ in size.

    Note:
        Under DDP the counts are summed over ranks and rank 0 writes. Networks are frozen and in eval mode.
    """

    def __init__(
        self,
        perturbations: dict[str, str],
        networks: dict[str, nn.Module],
        weights: dict[str, str] | None = None,
        clamp: bool = True,
        filename: str = "transfer",
    ) -> None:
        if not perturbations or not networks:
            raise ValueError("perturbations and networks must each name at least one.")
        if unknown := sorted(set(weights or ()) - set(networks)):
            raise ValueError(f"weights names '{unknown[0]}', which is none of the networks {', '.join(networks)}.")
        self.sources = {name: load_perturbation(path) for name, path in perturbations.items()}
        self.networks = {name: network.requires_grad_(False) for name, network in networks.items()}
        for name, path in (weights or {}).items():
            load_weights(self.networks[name], path)
        self.clamp, self.filename = clamp, filename
        self.metrics: dict[tuple[str, str], FoolingRatio] = {}
        self.matrix: np.ndarray | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring everything to the device."""
        device = pl_module.device
        for network in self.networks.values():
            network.to(device).eval()
        self.sources = {name: v.to(device) for name, v in self.sources.items()}
        self.metrics = {(a, b): FoolingRatio().to(device) for a in self.sources for b in self.networks}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Pass a batch through everything."""
        batch = model_input(batch)
        image, labels = batch["image"], batch["label"]
        for name, v in self.sources.items():
            if v.shape[1:] != image.shape[1:]:
                raise ValueError(
                    f"the perturbation '{name}' is {tuple(v.shape[1:])}, but the images are {tuple(image.shape[1:])}."
                )
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            moved = {name: perturbed(image, v, self.clamp) for name, v in self.sources.items()}
            for target, network in self.networks.items():
                clean = logits_of(network(image)).argmax(1)
                for source, images in moved.items():
                    self.metrics[source, target].update(logits_of(network(images)).argmax(1), clean, labels)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks, log and write."""
        names = list(self.sources), list(self.networks)
        values = {pair: 100 * float(metric.compute()) for pair, metric in self.metrics.items()}
        self.matrix = np.array([[values[a, b] for b in names[1]] for a in names[0]])
        for (a, b), value in values.items():
            pl_module.log(f"transfer/{a}/{b}", value)
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_transfer(folder / self.filename, self.matrix, *names)


def write_transfer(path: Path, matrix: np.ndarray, sources: Sequence[str], targets: Sequence[str]) -> None:
    """Write a transfer matrix as ``.csv``, ``.json`` and ``.png``, each atomically.

    Args:
        path: without suffix.
        matrix: (sources, targets) fooling ratios in percent.
        sources: names of the rows.
        targets: names of the columns.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["crafted on", *targets])
    for name, row in zip(sources, matrix, strict=True):
        writer.writerow([name, *(f"{value:.2f}" for value in row)])
    with atomic_write(path.with_suffix(".csv")) as temporary:
        temporary.write_text(text.getvalue(), "utf-8")
    rows: Mapping[str, Any] = {
        a: dict(zip(targets, map(float, row), strict=True)) for a, row in zip(sources, matrix, strict=True)
    }
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"fooling_ratio_percent": rows}, indent=2) + "\n", "utf-8")
    with atomic_write(path.with_suffix(".png")) as temporary, temporary.open("wb") as file:
        draw_transfer(matrix, sources, targets).savefig(file, format="png")


def draw_transfer(matrix: np.ndarray, sources: Sequence[str], targets: Sequence[str]) -> Figure:
    """A heat map of a transfer matrix; where a source is its own target the number is bold.

    Args:
        matrix: (sources, targets) fooling ratios in percent.
        sources: names of the rows.
        targets: names of the columns.
    """
    cell, label = 0.85, 0.09 * max(map(len, [*sources, *targets]))
    left, top, right, bottom = 0.55 + label, 0.9, 1.1, 0.2
    wide = 0.09 * max(map(len, targets))
    slanted = wide > cell  # names of columns would overlap
    top += 0.7 * wide if slanted else 0.0
    width, height = left + cell * len(targets) + right, top + cell * len(sources) + bottom
    figure = Figure((width, height), dpi=150, facecolor="white")
    size = (cell * len(targets) / width, cell * len(sources) / height)
    axes = figure.add_axes((left / width, bottom / height, *size))
    figure.suptitle("Predictions that a perturbation changes", fontsize=10, y=1 - 0.08 / height, va="top")
    shown = axes.imshow(matrix, cmap="magma_r", vmin=0, vmax=100, aspect="auto")
    slant: dict[str, Any] = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(targets)), list(targets), fontsize=9, **slant)
    axes.set_yticks(range(len(sources)), list(sources), fontsize=9)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("tried on", fontsize=9, labelpad=6)
    axes.set_ylabel("crafted on", fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, source in enumerate(sources):
        for column, target in enumerate(targets):
            value = matrix[row, column]
            colour = "white" if value > 38 else "#16191d"
            own = source == target
            weight = "bold" if own else "normal"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=10, weight=weight)
    bar = figure.add_axes(((left + cell * len(targets) + 0.2) / width, bottom / height, 0.14 / width, size[1]))
    figure.colorbar(shown, cax=bar).ax.tick_params(labelsize=8, length=2)
    bar.set_ylabel("fooling ratio, %", fontsize=8)
    return figure
