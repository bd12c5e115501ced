"""m-sharpness: how much the loss rises when each group of samples climbs along its own gradient.

Sources: SAM and m-sharpness (arXiv:2010.01412, 2206.06232), ASAM (2102.11600).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_above, check_at_least, check_choice
from torchlethe.functional.mean_loss import Batches, Loss, MeanLoss, Reduce, wide_zero
from torchlethe.functional.perturbation import Adaptive, adaptive_scale, total_norm


def climb(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: float,
    adaptive: Adaptive | None = None,
    eta: float = 0.01,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """The perturbation ε that raises the linearised loss most within a ball of radius ρ.

    Without ``adaptive`` ε = ρ·g / (‖g‖ + 1e-12), the step of SAM. With it the ball is scaled by T, ε = ρ·T²g / (‖Tg‖ +
    1e-12), the step of ASAM: T = |w| for ``w2``; T = |w| + η for parameters whose name contains ``weight`` and 1 for
    the others for ``eta`` (the authors' code).

    Args:
        parameters: w.
        gradients: g, in the same order.
        rho: ρ.
        adaptive: ``w2``, ``eta`` or ``None``.
        eta: η.
        names: of the parameters, for ``eta``.

    Returns:
        ε, in the same order.

    Example:
        >>> climb([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])], rho=0.5)
        [tensor([0.3000, 0.4000])]
    """
    directions, scaled = list(gradients), list(gradients)
    if adaptive is not None:
        scales = adaptive_scale([value.detach() for value in parameters], adaptive, eta, names)
        scaled = list(torch._foreach_mul(directions, scales))
        directions = list(torch._foreach_mul(scaled, scales))
    return list(torch._foreach_mul(directions, rho / (total_norm(scaled) + 1e-12)))


def m_sharpness(
    network: nn.Module,
    batches: Batches,
    rho: float = 0.05,
    m: int | None = 128,
    *,
    adaptive: Adaptive | None = None,
    eta: float = 0.01,
    loss: Loss | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """m-sharpness: the mean rise L(w + ε) − L(w) over groups of m samples, each with its own climb ε (:func:`climb`).

    Groups are runs of m consecutive samples, whatever the batches; a shorter last one counts by its size. The weights
    are moved in place for the second pass and put back bit for bit.

    Args:
        network: as in :class:`MeanLoss`, like ``batches``, ``loss`` and ``reduce``.
        batches: pairs of images and labels. One forward pass is over samples of the same batch and the same group.
        rho: radius ρ > 0 of the climb.
        m: samples in a group; ``None`` takes all samples (of all ranks) as one.
        adaptive: as in :func:`climb`, like ``eta``. Values with and without are not comparable for the same ρ.
        eta: η of ``adaptive="eta"``.
        loss: mean over a batch.
        reduce: sum over ranks. With ``m`` given, a rank's groups are its own: for the value of one process each must
            hold whole groups.

    Returns:
        Float64 scalar, in the unit of the loss.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> network = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(network.weight)
        >>> batches = [(torch.ones(4, 1), torch.zeros(4, 1))]  # L(w) = w²
        >>> round(m_sharpness(network, batches, rho=0.5, m=2, loss=nn.functional.mse_loss).item(), 6)
        1.25
    """
    check_climb(rho, m, adaptive, eta)
    whole = MeanLoss(network, batches, loss, reduce)  # refuses what cannot work, also on a rank without a group
    if m is None:
        return _rise(whole, rho, adaptive, eta)
    rise, count = (wide_zero(whole.parameters[0]) for _ in range(2))
    for group in groups_of(batches, m):
        size = sum(len(label) for _, label in group)
        rise += size * _rise(MeanLoss(network, group, loss), rho, adaptive, eta)
        count += size
    if reduce is not None:
        rise, count = reduce(rise), reduce(count)
    if not count.item():
        raise ValueError("batches is empty, but at least one sample is needed.")
    return rise / count


def _rise(mean_loss: MeanLoss, rho: float, adaptive: Adaptive | None, eta: float) -> Tensor:
    before, gradients = mean_loss.gradient()
    weights = mean_loss.parameters
    with torch.inference_mode(False), torch.no_grad():
        saved = [value.clone() for value in weights]
        try:
            torch._foreach_add_(weights, climb(weights, gradients, rho, adaptive, eta, mean_loss.names), alpha=1)
            return mean_loss.value() - before
        finally:
            torch._foreach_copy_(weights, saved)


def groups_of(batches: Batches, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut batches into groups of consecutive samples.

    Args:
        batches: pairs of images and labels, of any sizes.
        size: samples in a group.

    Yields:
        Pieces of batches, views, with ``size`` samples together; fewer in the last group.

    Example:
        >>> batches = [(torch.arange(3), torch.arange(3)), (torch.arange(3, 5), torch.arange(3, 5))]
        >>> [[label.tolist() for _, label in group] for group in groups_of(batches, 2)]
        [[[0, 1]], [[2], [3]], [[4]]]
    """
    group: list[tuple[Tensor, Tensor]] = []
    missing = size
    for image, label in batches:
        start = 0
        while start < len(label):
            stop = min(start + missing, len(label))
            group.append((image[start:stop], label[start:stop]))
            start, missing = stop, missing - (stop - start)
            if not missing:
                yield group
                group, missing = [], size
    if group:
        yield group


def check_climb(rho: float, m: int | None, adaptive: str | None, eta: float = 0.0) -> None:
    """Refuse arguments that :func:`m_sharpness` cannot take.

    Raises:
        ValueError: ``rho`` or ``m`` is not above 0, ``eta`` below 0, or ``adaptive`` unknown.
    """
    check_above(0, rho=rho, m=1 if m is None else m)
    check_choice((None, "w2", "eta"), adaptive=adaptive)
    check_at_least(0, eta=eta)
