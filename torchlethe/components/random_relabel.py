"""Random labels for forget samples, the same for a sample whatever batch, rank or resumed run it comes in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.data import mix_seed, random_bits


class RandomRelabel:
    """Draws a label for each sample as a pure function of (seed, pass, index of the sample).

    Args:
        labels: ``all``, uniform over all K classes, so that one in K keeps its label; or ``other``, uniform over the
            K - 1 wrong ones.
        redraw: a new label in each pass over the samples (``epoch``), or the same throughout (``once``).
        seed: seed of the draw, apart from those of order and augmentation.

    Raises:
        ValueError: ``labels`` or ``redraw`` is unknown.

    Note:
        Batches of Lethe's loaders carry the ``index`` of each sample and the ``epoch``. For batches without them
        ``epoch`` draws anew at every step, by position; ``once`` is refused. Nothing waits for the device.

    Example:
        >>> relabel = RandomRelabel("other", "once")
        >>> batch = {"label": torch.tensor([1, 1, 1]), "index": torch.tensor([0, 1, 2])}
        >>> drawn = relabel(batch, num_classes=3, k=0)
        >>> bool((drawn != 1).all()), torch.equal(drawn, relabel(batch, num_classes=3, k=7))
        (True, True)
    """

    def __init__(
        self, labels: Literal["all", "other"] = "all", redraw: Literal["epoch", "once"] = "epoch", seed: int = 0
    ) -> None:
        check_choice(("all", "other"), labels=labels)
        check_choice(("epoch", "once"), redraw=redraw)
        self.labels, self.redraw, self.seed = labels, redraw, seed

    def __call__(self, batch: dict[str, Any], num_classes: int, k: int) -> Tensor:
        """Draw labels for a batch.

        Args:
            batch: ``label`` (B,) int64, and where there are any ``index`` (B,) and ``epoch`` (B,).
            num_classes: number of classes K, at least 2.
            k: number of the step, used where there is no ``index`` or ``epoch``.

        Returns:
            (B,) int64 on the device of ``label``, in [0, K).

        Raises:
            ValueError: labels are to be drawn once and the batch has no ``index``.
        """
        true = batch["label"]
        index = batch.get("index")
        if index is None and self.redraw == "once":
            raise ValueError(
                "redraw is 'once', but the batches have no `index` to know a sample by: use 'epoch' or add it."
            )
        epoch: Tensor | int = 0
        if self.redraw == "epoch":
            epoch = batch["epoch"] if index is not None and "epoch" in batch else k
        if index is None:
            index = torch.arange(len(true), device=true.device)
        # salted, since the augmentation draws from the same three numbers
        bits = random_bits(mix_seed(self.seed, *b"relabel"), epoch, index, 1)[:, 0]
        if self.labels == "all":
            return (bits * num_classes) >> 32
        return (true + 1 + ((bits * (num_classes - 1)) >> 32)) % num_classes
