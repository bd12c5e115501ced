"""A look back over a run's forgetting steps: were they strong enough to forget anything?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchlethe.components.distributed import all_reduce_mean


class ForgetWatch:
    """Remembers each forgetting step's loss and whether it was clipped, on the device, and warns at the end.

    Args:
        steps: number of forgetting steps of the run.
        clip: the clipping norm; ``inf`` never clips.

    Attributes:
        losses: loss before each step ``(steps,)``, NaN for those to come; None before the first.
        clipped: how many steps were clipped; None before the first.

    Note:
        Losses are those of a rank's own batches, the gradient's norm is the same on every rank. :meth:`warn` and
        :meth:`state_dict` take the mean over ranks, so every rank has to call them.
    """

    def __init__(self, steps: int, clip: float) -> None:
        self.steps, self.clip = steps, clip
        self.losses: Tensor | None = None
        self.clipped: Tensor | None = None

    @torch.no_grad()
    def add(self, number: int, loss: Tensor, norm: Tensor) -> None:
        """Take in a step.

        Args:
            number: of the forgetting step, from 0.
            loss: the mean loss of its batch, a scalar.
            norm: the gradient's norm before it was clipped, a scalar.
        """
        if self.losses is None:
            self.losses = loss.new_full((self.steps,), math.nan)
        self.losses[number] = loss
        clipped = (norm > self.clip).long()
        self.clipped = clipped if self.clipped is None else self.clipped + clipped

    def warn(self, advice: str) -> None:
        """Warn of signs that little was forgotten: no step was clipped, or the loss on forget batches did not rise.

        Args:
            advice: what to do about it, the end of a sentence.
        """
        if self.clipped is not None and self.clip < math.inf and not self.clipped.item():
            warnings.warn(
                f"no forgetting step reached the clipping norm {self.clip}: if too little was forgotten, {advice}",
                stacklevel=3,
            )
        if self.losses is None:
            return
        losses = all_reduce_mean(self.losses)
        losses = losses[losses.isfinite()].float()
        if len(losses) >= 4:
            # each batch has other samples: compare the first, before anything moved, with a quarter of the run
            before, after = losses[0].item(), losses[-(len(losses) // 4) :].mean().item()
            if after < 1.1 * before + 1e-3:
                warnings.warn(
                    f"the loss on forget batches did not move, from {before:.3g} to {after:.3g} in the last quarter of "
                    f"the forgetting steps: {advice}",
                    stacklevel=3,
                )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run judges too; the same on every rank."""
        losses = None if self.losses is None else all_reduce_mean(self.losses)
        return {"clipped_steps": self.clipped, "forget_losses": losses}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`; a checkpoint from before the watch has none."""
        self.clipped, self.losses = (
            None if state.get(name) is None else state[name].to(device) for name in ("clipped_steps", "forget_losses")
        )
