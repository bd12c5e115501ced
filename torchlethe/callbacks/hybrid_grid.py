"""A picture of what NatMU trains on: forget image, remaining image, mixture, old and new label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from torchlethe.arguments import check_at_least
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.data import HybridDataset
from torchlethe.io import atomic_write

INK, SOFT, OLD, NEW = "#1f2430", "#6b7280", "#b4531f", "#1f6f78"


class HybridGrid(Callback):
    """Draw some hybrids into the run's folder before the first step of :class:`~torchlethe.lightning_modules.NatMU`.

    One row for each forget image: the image with its old label, then for each of its hybrids the remaining image that
    is mixed in and the mixture with its new label; above them the masks (white: the forget image shows).

    Args:
        rows: forget images to draw, at least 1; taken at even distances from the forget set.
        filename: name of the PNG file in the run's folder: the logger's, else the Trainer's ``default_root_dir``.

    Raises:
        ValueError: an argument is out of range, or the module trains on no hybrids.

    Note:
        Rank 0 draws. A ``fast_dev_run`` draws nothing.

    Example:
        >>> HybridGrid(rows=4).filename
        'hybrids.png'
    """

    def __init__(self, rows: int = 6, filename: str = "hybrids.png") -> None:
        check_at_least(1, rows=rows)
        if not filename.endswith(".png"):
            raise ValueError(f"filename is '{filename}', it must end in .png.")
        self.rows, self.filename = rows, filename
        self._drawn = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw anew in a new fit."""
        self._drawn = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw once, when the pairs are known."""
        if self._drawn:
            return
        self._drawn = True
        union: Any = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(union, HybridDataset):
            raise ValueError(f"HybridGrid draws the hybrids of NatMU, {type(pl_module).__name__} trains on none.")
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        count = min(self.rows, len(union.forget))
        rows = torch.arange(count) * len(union.forget) // count
        figure = draw_hybrids(union.examples(rows), union.forget.classes)
        with atomic_write(folder / self.filename) as temporary, temporary.open("wb") as file:
            figure.savefig(file, format="png")


def draw_hybrids(examples: dict[str, Tensor], classes: Sequence[str]) -> Figure:
    """Draw what :meth:`torchlethe.data.HybridDataset.examples` returns.

    Args:
        examples: R forget images, their n partners and mixtures, labels and masks.
        classes: names of the classes.

    Returns:
        A figure with R rows; save it with ``savefig``.
    """
    rows, count = examples["new_label"].shape
    names = [classes[int(label)] for label in examples["old_label"]]
    others = [[classes[int(label)] for label in line] for line in examples["new_label"]]
    changes = [[f"{old} → {new}" for new in line] for old, line in zip(names, others, strict=True)]
    font = min(8.0, 125 / max(len(text) for line in changes for text in line))  # the longest fits below its image
    side, gap, label, head, title = 1.1, 0.2, 0.27, 0.98, 0.62  # inches
    width = 2 * gap + (1 + 2 * count) * (side + 0.05) + count * 0.22
    height = title + head + rows * (side + label) + gap
    figure = Figure((width, height), dpi=130, facecolor="white")

    def place(column: int, top: float, size: float = side) -> Axes:
        left = gap + column * (side + 0.05) + (column + 1) // 2 * 0.22 + (side - size) / 2
        axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#d1d5db", linewidth=0.6)
        return axes

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="center", **style)

    def over(column: int, text: str) -> None:
        left = gap + column * (side + 0.05) + (column + 1) // 2 * 0.22
        write(left + side / 2, title + head - 0.11, text, color=SOFT, fontsize=8, ha="center")

    write(gap, 0.26, "Hybrids of NatMU", color=INK, fontsize=12, fontweight="bold")
    write(gap, 0.5, "each forget image, mixed with remaining images and given their labels", color=SOFT, fontsize=8)
    write(gap, title + head / 2 - 0.1, "share of the\nforget image\n(white: all)", color=SOFT, fontsize=8)
    over(0, "forget image")
    for number in range(count):
        axes = place(2 + 2 * number, title + 0.06, 0.66)
        axes.imshow(examples["masks"][number % len(examples["masks"])].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        over(1 + 2 * number, "remaining")
        over(2 + 2 * number, "mixture")
    for row in range(rows):
        top = title + head + row * (side + label)
        pictures: list[tuple[int, Tensor, str, dict[str, Any]]]
        pictures = [(0, examples["forget"][row], names[row], {"color": OLD, "fontweight": "bold"})]
        for number in range(count):
            remain, mixture = (examples[name][row, number] for name in ("remain", "mixture"))
            pictures.append((1 + 2 * number, remain, others[row][number], {"color": SOFT}))
            pictures.append((2 + 2 * number, mixture, changes[row][number], {"color": NEW, "fontweight": "bold"}))
        for column, image, text, style in pictures:
            axes = place(column, top)
            _show(axes, image)
            axes.set_xlabel(text, fontsize=font, labelpad=3, **style)
    return figure


def _show(axes: Axes, image: Tensor) -> None:
    """Show (C, H, W) uint8, or floating of any range, which is stretched to [0, 1]."""
    pixels = image.cpu().float()
    if image.dtype is torch.uint8:
        pixels = pixels / 255
    elif pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    shown = pixels[0] if len(pixels) != 3 else pixels.permute(1, 2, 0)
    axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
