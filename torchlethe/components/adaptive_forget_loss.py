"""The adaptive forgetting loss of SFRon as a module."""

from __future__ import annotations

from torch import Tensor, nn

from torchlethe.arguments import check_at_least, check_within
from torchlethe.components.distributed import all_reduce_sum, world_size
from torchlethe.functional.forgetting import forget_coefficients


class AdaptiveForgetLoss(nn.Module):
    r"""Weighted forgetting loss :math:`\sum_i w_i \ell_i`, low-loss samples first (SFRon, code ``AdaptiveLoss``).

    Args:
        lam: exponent :math:`\lambda` in [0, 1]; 0 weighs all samples alike.
        floor: lower bound on a loss inside its coefficient, see
            :func:`~torchlethe.functional.forgetting.forget_coefficients`. The official code has 0; the default keeps
            samples whose loss is exactly 0 from taking the whole weight.

    Raises:
        ValueError: ``lam`` or ``floor`` is out of range.

    Note:
        Under DDP the weights are normalised over the batches of all ranks, and the value is scaled by the number of
        ranks: after DDP has averaged the gradients they are those of one process with the joined batch.

    Example:
        >>> import torch
        >>> AdaptiveForgetLoss(lam=0.5)(torch.tensor([0.25, 4.0]))
        tensor(1.)
    """

    def __init__(self, lam: float = 0.5, floor: float = 1e-6) -> None:
        super().__init__()
        check_within(0, 1, lam=lam)
        check_at_least(0, floor=floor)
        self.lam = lam
        self.floor = floor

    def weights(self, losses: Tensor) -> Tensor:
        """The detached weights, shape ``(B,)``; they sum to 1 over all ranks."""
        coefficients = forget_coefficients(losses, self.lam, self.floor)
        return coefficients / all_reduce_sum(coefficients.sum())

    def forward(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weigh per-sample losses, shape ``(B,)``, into a scalar; :meth:`weights` may be passed where it is at hand."""
        return world_size() * ((self.weights(losses) if weights is None else weights) * losses).sum()

    def extra_repr(self) -> str:
        """The arguments, as printed with the module."""
        return f"lam={self.lam}, floor={self.floor}"
