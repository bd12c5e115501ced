"""Fast-slow weights: the implicit inverse Hessian of SFRon and UG-CLU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchlethe.arguments import check_within


class FastSlowUpdater:
    r"""Pull the weights back towards where they were: :math:`\theta \leftarrow \beta\theta + (1-\beta)\theta_{prev}`.

    After a forgetting step and T repair steps on the remaining data, the pulled weights have moved along the
    forgetting direction filtered by :math:`(I - \eta H_r)^T`, a damped inverse Hessian of the remaining data:
    directions that matter to it are restored, flat ones keep the forgetting.

    Args:
        parameters: the parameters; buffers are left alone.
        beta: share of the new weights in [0, 1]. With 1 nothing is copied and nothing is pulled.

    Raises:
        ValueError: ``beta`` is out of range.

    Note:
        Under DDP every rank holds the same weights and pulls them alike.
    """

    def __init__(self, parameters: Iterable[Tensor], beta: float = 1.0) -> None:
        check_within(0, 1, beta=beta)
        self.beta = beta
        self.parameters = list(parameters)
        self.previous = [p.detach().clone() for p in self.parameters] if beta < 1 else []

    @torch.no_grad()
    def pull(self) -> None:
        """Interpolate in place and remember the result as the next starting point."""
        if self.beta == 1:
            return
        torch._foreach_lerp_(self.parameters, self.previous, 1 - self.beta)
        torch._foreach_copy_(self.previous, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The starting point of the next pull; empty when ``beta`` is 1."""
        return {"previous": list(self.previous)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a starting point saved for the same parameters."""
        if len(state["previous"]) != len(self.previous):
            raise ValueError(
                f"beta is {self.beta}, but the saved run had the slow update {'on' if state['previous'] else 'off'}."
            )
        for anchor, saved in zip(self.previous, state["previous"], strict=True):
            anchor.copy_(saved)
