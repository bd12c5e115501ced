"""Top eigenvalues and trace of the Hessian of the mean loss.

Sources: Lanczos with thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000), Hutchinson (Commun. Stat. 18,
1989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchlethe.arguments import check_above
from torchlethe.functional.mean_loss import Batches, Loss, MeanLoss, Reduce, widest


class Eigenvalues(NamedTuple):
    """The largest eigenvalues of a symmetric operator.

    Attributes:
        values: (k,) float64 on the CPU, in descending order; NaN where the operator gave none.
        residuals: (k,) norms ‖Hx − λx‖ of the unit eigenvectors found: an eigenvalue lies within this distance.
        sweeps: how often the operator was applied.
        converged: whether the residuals are within the tolerance.
    """

    values: Tensor
    residuals: Tensor
    sweeps: int
    converged: bool


class TraceEstimate(NamedTuple):
    """A trace, estimated.

    Attributes:
        value: float64 scalar, the mean over probes.
        standard_error: float64 scalar, the probes' standard deviation over √probes; NaN for a single probe.
    """

    value: Tensor
    standard_error: Tensor


def top_eigenvalues(
    product: Callable[[Tensor], Tensor],
    size: int,
    k: int = 1,
    *,
    like: Tensor,
    tolerance: float = 1e-4,
    max_sweeps: int = 200,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> Eigenvalues:
    """The k largest eigenvalues of a symmetric operator, by Lanczos with full orthogonalisation and thick restarts.

    Largest means largest in the algebraic sense, not in magnitude: an operator with eigenvalues −5 and 1 has the top
    eigenvalue 1 (power iteration would find −5). A repeated eigenvalue may count once.

    Args:
        product: maps (P,) to (P,); it is called once a sweep.
        size: P.
        k: number of eigenvalues.
        like: a tensor with the dtype and on the device of the vectors. Memory: at most 2k + 14 vectors.
        tolerance: stop when each residual is within this share of its eigenvalue. The error of the eigenvalue is then
            usually its square.
        max_sweeps: stop after so many products.
        seed: seed of the first vector, which is drawn on the CPU and thus the same on every device.
        reduce: sums a tensor over all ranks; ranks then stop together.

    Returns:
        See :class:`Eigenvalues`.

    Raises:
        ValueError: an argument is out of range, or the operator is not symmetric.

    Example:
        >>> matrix = torch.diag(torch.tensor([-5.0, 0.5, 1.0], dtype=torch.float64))
        >>> found = top_eigenvalues(lambda vector: matrix @ vector, 3, k=2, like=matrix)
        >>> [round(value, 6) for value in found.values.tolist()]
        [1.0, 0.5]
    """
    check_above(0, tolerance=tolerance, max_sweeps=max_sweeps, k=k)
    if k > size:
        raise ValueError(f"k={k} eigenvalues are asked for, but there are {size} dimensions.")
    if k > max_sweeps:
        raise ValueError(f"max_sweeps is {max_sweeps}, it must be at least k={k}.")
    generator = torch.Generator().manual_seed(seed)
    limit = min(size, 2 * k + 14, max_sweeps + 1)
    basis = like.new_empty(limit, size)
    basis[0] = _fresh(basis[:0], generator)
    matrix = torch.zeros(limit, limit, dtype=torch.float64)  # the operator, projected on the basis
    top = residuals = torch.full((k,), torch.nan, dtype=torch.float64)
    used, sweeps, done, coupling = 1, 0, False, torch.zeros(0, dtype=torch.float64)
    while sweeps < max_sweeps:
        sweeps += 1
        overlap, rest = _orthogonalise(basis[:used], product(basis[used - 1]))
        # the only wait for the device in a sweep
        *column, beta = torch.cat([overlap, torch.linalg.vector_norm(rest)[None]]).double().tolist()
        matrix[:used, used - 1] = matrix[used - 1, :used] = torch.tensor(column, dtype=torch.float64)
        if not bool(matrix.isfinite().all()) or beta != beta:
            top = residuals = torch.full((k,), torch.nan, dtype=torch.float64)
            break
        # vᵀHu was found as uᵀHv before: a missing second derivative shows, though autograd may keep silent about it
        if len(coupling) and float((matrix[: used - 1, used - 1] - coupling).abs().max()) > 0.01 * matrix.norm():
            raise ValueError("product is not symmetric: if a Hessian's, some operation lacks its second derivative.")
        values, rotation = torch.linalg.eigh(matrix[:used, :used])
        top, residuals = values.flip(0)[:k], beta * rotation[-1].abs().flip(0)[:k]
        noise = 16 * torch.finfo(like.dtype).eps * float(values.abs().max())
        done = used >= k and bool((residuals <= (tolerance * top.abs()).clamp_min(noise)).all())
        waiting = like.new_tensor(float(not done and used < size))
        if (reduce(waiting) if reduce else waiting).item() == 0:
            done = True
            break
        if used == limit:
            used = k + (limit - k) // 3
            basis[:used] = rotation[:, -used:].T.to(basis) @ basis
            matrix.zero_()
            matrix.diagonal()[:used] = values[-used:]
            coupling = beta * rotation[-1, -used:]
        else:
            coupling = torch.tensor([*[0.0] * (used - 1), beta], dtype=torch.float64)
        # where the basis is closed under the operator, another direction goes on
        basis[used] = rest / beta if beta > noise else _fresh(basis[:used], generator)
        used += 1
    return Eigenvalues(top, residuals, sweeps, done)


def _orthogonalise(basis: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of a vector in an orthonormal basis, and the rest; twice, as once leaves rounding errors."""
    overlap = basis @ vector
    rest = vector - overlap @ basis
    again = basis @ rest
    return overlap + again, rest - again @ basis


def _fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector that is orthogonal to an orthonormal basis."""
    vector = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    rest = _orthogonalise(basis, vector / torch.linalg.vector_norm(vector))[1]
    return rest / torch.linalg.vector_norm(rest)


def hessian_top_eigenvalues(
    network: nn.Module,
    batches: Batches,
    k: int = 1,
    *,
    loss: Loss | None = None,
    tolerance: float = 1e-4,
    max_sweeps: int = 200,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> Eigenvalues:
    """The k largest (algebraic) eigenvalues of the Hessian of the mean loss; see :func:`top_eigenvalues`.

    Args:
        network: as in :class:`MeanLoss`, like ``batches``, ``loss`` and ``reduce``.
        batches: pairs of images and labels.
        k: number of eigenvalues.
        loss: mean over a batch.
        tolerance: as in :func:`top_eigenvalues`, like ``max_sweeps`` and ``seed``.
        max_sweeps: bound on the passes over ``batches``.
        seed: seed of the first vector.
        reduce: sum over ranks.

    Returns:
        See :class:`Eigenvalues`.

    Raises:
        ValueError: an argument is out of range, or the network cannot be differentiated twice.

    Example:
        >>> network = nn.Linear(1, 1, bias=False)  # L(w) = mean of (w·x − y)², L'' = 2·mean(x²)
        >>> batches = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> round(hessian_top_eigenvalues(network, batches, loss=nn.functional.mse_loss).values.item(), 5)
        10.0
    """
    mean_loss = MeanLoss(network, batches, loss, reduce)
    return top_eigenvalues(
        mean_loss.hessian_product,
        mean_loss.size,
        k,
        like=mean_loss.parameters[0].detach(),
        tolerance=tolerance,
        max_sweeps=max_sweeps,
        seed=seed,
        reduce=reduce,
    )


def hessian_trace(
    network: nn.Module,
    batches: Batches,
    probes: int = 32,
    *,
    loss: Loss | None = None,
    together: int = 8,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> TraceEstimate:
    """The trace of the Hessian of the mean loss: Hutchinson's mean of zᵀHz over vectors z of random signs.

    Args:
        network: as in :class:`MeanLoss`, like ``batches``, ``loss`` and ``reduce``.
        batches: pairs of images and labels.
        probes: number of vectors; the standard error falls with their square root.
        loss: mean over a batch.
        together: probes per pass over ``batches``: they share the first derivative, and are in memory together.
        seed: seed of the signs, drawn on the CPU; the first n probes are the same for any number of probes.
        reduce: sum over ranks.

    Returns:
        See :class:`TraceEstimate`.

    Raises:
        ValueError: an argument is out of range, or the network cannot be differentiated twice.

    Example:
        >>> network = nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.eye(2), torch.zeros(2, 1))]  # H is the identity: each probe is exact
        >>> [value.item() for value in hessian_trace(network, batches, 4, loss=nn.functional.mse_loss)]
        [2.0, 0.0]
    """
    check_above(0, probes=probes, together=together)
    mean_loss = MeanLoss(network, batches, loss, reduce)
    generator, like, found = torch.Generator().manual_seed(seed), mean_loss.parameters[0], []
    for start in range(0, probes, together):
        signs = [torch.randint(2, (mean_loss.size,), generator=generator) for _ in range(min(together, probes - start))]
        vectors = torch.stack(signs).mul_(2).sub_(1).to(like)
        found.append((vectors * mean_loss.hessian_product(vectors)).sum(1, dtype=widest(like.device)))
    values = torch.cat(found)
    spread = values.std() if probes > 1 else values.new_tensor(torch.nan)
    return TraceEstimate(values.mean(), spread / probes**0.5)
