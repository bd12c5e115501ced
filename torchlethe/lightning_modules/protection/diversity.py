"""How different the checkpoints of one run are: the angles between their input gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from torchlethe.components import all_reduce_sum, gradients_on
from torchlethe.data import PADDING_LABEL, as_batch
from torchlethe.io import atomic_write, local_path
from torchlethe.lightning_modules.protection.base import pixels
from torchlethe.updates.protection.self_ensemble import SelfEnsembleProtector


class CheckpointDiversity(LightningModule):
    """Measure the paper's reason for self-ensembles: the input gradients of checkpoints are nearly orthogonal.

    ``test`` averages, over the images of the test loader, |cos| of the angle between the input gradients of each two
    checkpoints (of the cross-entropy to a wrong class), logs the mean over pairs as ``mean_cosine`` and writes
    ``cosines.json`` (the matrix and the epochs) and ``cosines.png`` (a heat map) into the run's folder. Random
    directions in d dimensions have about √(2/(π·d)).

    Args:
        network: a classifier that gives the architecture.
        num_classes: number of classes.
        ensemble: the folder that ``CheckpointEnsemble`` wrote.
        checkpoints: N, chosen at equal distances.
        resident: keep all checkpoints on the device; otherwise each is read whenever it is needed.

    Attributes:
        cosines: (N, N) after a test; 1 on the diagonal (less where gradients vanish).

    Raises:
        FileNotFoundError: the ensemble does not exist.
        ValueError: an argument is out of range, or the ensemble's files are damaged or fit another network.

    Note:
        Under DDP the sums of all ranks are added up, padding is left out, and rank 0 writes.
    """

    def __init__(
        self, network: nn.Module, num_classes: int, ensemble: str | Path, checkpoints: int = 10, resident: bool = False
    ) -> None:
        super().__init__()
        self.rule = SelfEnsembleProtector(network, num_classes, ensemble, checkpoints=checkpoints, resident=resident)
        self.networks = nn.ModuleDict(self.rule.networks)
        self.cosines = torch.zeros(0, 0)
        self._sum: Tensor | None = None
        self._count = 0

    def configure_optimizers(self) -> None:
        """None: nothing is trained here."""

    def on_test_start(self) -> None:
        """Start anew."""
        self._sum, self._count = None, 0
        with torch.inference_mode(False):
            self.rule.prepare([], device=self.device)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add up one batch."""
        batch = as_batch(batch)
        with gradients_on():
            image, label = pixels(batch["image"]), batch["label"].long().clone()
            keep = label != PADDING_LABEL
            if keep.any():
                cosines = self.rule.cosines(image[keep], label[keep])
                self._sum = cosines if self._sum is None else self._sum + cosines
                self._count += int(keep.sum())

    def on_test_epoch_end(self) -> None:
        """Average, log and write."""
        n = self.rule.checkpoints
        total = torch.zeros(n, n, dtype=torch.float64, device=self.device) if self._sum is None else self._sum
        count = all_reduce_sum(torch.tensor(float(self._count), dtype=torch.float64, device=self.device))
        self.cosines = (all_reduce_sum(total) / count).cpu()
        if n > 1:
            others = ~torch.eye(n, dtype=torch.bool)
            self.log("mean_cosine", float(self.cosines[others].mean()), rank_zero_only=True)
        folder = local_path(self.trainer.log_dir or self.trainer.default_root_dir)  # on every rank: rank 0 tells it
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            epochs = [member.get("epoch", number) for number, member in enumerate(self.rule.members)]
            content = {"epochs": epochs, "images": int(count), "cosines": self.cosines.tolist()}
            with atomic_write(folder / "cosines.json") as temporary:
                temporary.write_text(json.dumps(content) + "\n")
            draw_cosines(self.cosines, epochs, folder / "cosines.png")


def draw_cosines(cosines: Tensor, epochs: list[int], path: str | Path) -> None:
    """Draw the matrix as a heat map.

    Args:
        cosines: (N, N) in [0, 1].
        epochs: the checkpoints' epochs, from 0.
        path: the ``.png`` file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(cosines.numpy(), vmin=0, vmax=1, cmap="viridis")
    marks = range(0, len(epochs), max(1, len(epochs) // 10))
    axes.set_xticks(marks, [str(epochs[i] + 1) for i in marks])
    axes.set_yticks(marks, [str(epochs[i] + 1) for i in marks])
    axes.set(xlabel="epochs trained", ylabel="epochs trained", title="|cos| between input gradients, mean over images")
    figure.colorbar(shown)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
