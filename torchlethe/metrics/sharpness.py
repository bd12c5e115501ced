"""Sharpness of a network's minimum as torchmetrics: Hessian top eigenvalue, Hessian trace, m-sharpness."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics import Metric

from torchlethe.arguments import check_above
from torchlethe.functional.group_sharpness import Adaptive, check_climb, m_sharpness
from torchlethe.functional.hessian import Eigenvalues, TraceEstimate, hessian_top_eigenvalues, hessian_trace
from torchlethe.functional.mean_loss import Loss
from torchlethe.functional.uncertainty import PADDING_LABEL


class _Borrowed:
    """Holds a network and a loss without being their parent; copies of the holder hold the very same."""

    def __init__(self, network: nn.Module, loss: Loss | None) -> None:
        self.network, self.loss = network, loss

    def __deepcopy__(self, memo: dict[int, Any]) -> _Borrowed:
        return self


class SharpnessMetric(Metric):
    """What the sharpness metrics share: they keep batches, and look at the network when computed.

    ``update`` only stores a batch, so that all samples are judged at the same weights: those at ``compute``, which
    passes the samples through the network many times, in eval mode and without autocast. The network is borrowed: it is
    no submodule, its weights are not in the metric's state, and it keeps its modes, gradients and buffers. Clones of
    the metric look at the same network.

    The samples stay in memory as they were given until ``reset`` (torchmetrics' ``compute_on_cpu=True`` keeps them on
    the CPU); some hundreds or thousands are enough. Batch sizes bound the memory of a pass and change no value.

    Under DDP each rank keeps its own samples and ``compute`` sums losses and derivatives over ranks: the value is that
    of one process with all samples. Every rank must call ``compute``, at the same weights.

    Args:
        network: maps images to what ``loss`` takes; a LightningModule may give itself.
        loss: mean over a batch; cross-entropy by default. A loss that is no mean over samples (class weights) makes the
            value depend on the batches.
        **kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    images: list[Tensor]
    labels: list[Tensor]

    def __init__(self, network: nn.Module, loss: Loss | None = None, **kwargs: Any) -> None:
        if not isinstance(network, nn.Module):
            raise ValueError(f"network is a {type(network).__name__}, it must be a torch.nn.Module.")
        # sums of derivatives travel between ranks, not the samples; the network may change between two calls
        super().__init__(sync_on_compute=False, compute_with_cache=False, **kwargs)
        self._borrowed = _Borrowed(network, loss)
        self.add_state("images", default=[], dist_reduce_fx=None)
        self.add_state("labels", default=[], dist_reduce_fx=None)

    def update(self, image: Tensor, label: Tensor) -> None:
        """Store a batch.

        Args:
            image: (B, …), as the network takes it.
            label: (B, …); class numbers (B,) may be −100, which marks padding: such rows are left out.

        Raises:
            ValueError: images and labels differ in number.
        """
        if not label.ndim or len(image) != len(label):
            raise ValueError(
                f"label has the shape {tuple(label.shape)}, it must hold one for each of {len(image)} images."
            )
        if label.ndim == 1 and not label.is_floating_point():
            real = label != PADDING_LABEL
            if not bool(real.all()):
                image, label = image[real], label[real]
            label = label.long()
        if len(label):
            self.images.append(image.detach())
            self.labels.append(label)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "network": self._borrowed.network,
            "batches": list(zip(self.images, self.labels, strict=True)),
            "loss": self._borrowed.loss,
            "reduce": _sum_over_ranks if dist.is_available() and dist.is_initialized() else None,
        }


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


class HessianTopEigenvalue(SharpnessMetric):
    """The largest eigenvalues (in the algebraic sense) of the Hessian of the mean loss, λ_max for ``k=1``.

    See :class:`SharpnessMetric` for what is stored, and :func:`torchlethe.functional.hessian_top_eigenvalues` for the
    method (Lanczos, one pass over the samples in each iteration).

    Args:
        network: maps images to logits.
        k: number of eigenvalues.
        tolerance: residual at which to stop, as a share of the eigenvalue.
        max_sweeps: bound on the passes.
        seed: seed of the first vector.
        loss: mean over a batch; cross-entropy by default.
        **kwargs: of :class:`torchmetrics.Metric`.

    Attributes:
        found: the last result with residuals and number of passes.

    Returns (compute):
        Float64, a scalar for ``k=1``, else (k,) in descending order; NaN where a derivative is not finite.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> network = nn.Linear(1, 1, bias=False)
        >>> metric = HessianTopEigenvalue(network, loss=nn.functional.mse_loss)
        >>> metric.update(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        >>> round(metric.compute().item(), 5)
        10.0
    """

    def __init__(
        self,
        network: nn.Module,
        k: int = 1,
        tolerance: float = 1e-4,
        max_sweeps: int = 200,
        seed: int = 0,
        loss: Loss | None = None,
        **kwargs: Any,
    ) -> None:
        check_above(0, k=k, tolerance=tolerance, max_sweeps=max_sweeps)
        super().__init__(network, loss, **kwargs)
        self.settings: dict[str, Any] = {"k": k, "tolerance": tolerance, "max_sweeps": max_sweeps, "seed": seed}
        self.found: Eigenvalues | None = None

    def compute(self) -> Tensor:
        """The eigenvalues."""
        self.found = hessian_top_eigenvalues(**self._arguments, **self.settings)
        return self.found.values.squeeze()


class HessianTrace(SharpnessMetric):
    """The trace of the Hessian of the mean loss, by Hutchinson's estimator with random signs.

    See :class:`SharpnessMetric` for what is stored, and :func:`torchlethe.functional.hessian_trace` for the method.

    Args:
        network: maps images to logits.
        probes: number of random vectors.
        together: vectors in memory at once.
        seed: seed of the vectors.
        loss: mean over a batch; cross-entropy by default.
        **kwargs: of :class:`torchmetrics.Metric`.

    Attributes:
        found: the last result with its standard error.

    Returns (compute):
        Float64 scalar.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> metric = HessianTrace(nn.Linear(2, 1, bias=False), probes=4, loss=nn.functional.mse_loss)
        >>> metric.update(torch.eye(2), torch.zeros(2, 1))
        >>> metric.compute().item(), metric.found.standard_error.item()
        (2.0, 0.0)
    """

    def __init__(
        self,
        network: nn.Module,
        probes: int = 32,
        together: int = 8,
        seed: int = 0,
        loss: Loss | None = None,
        **kwargs: Any,
    ) -> None:
        check_above(0, probes=probes, together=together)
        super().__init__(network, loss, **kwargs)
        self.settings: dict[str, Any] = {"probes": probes, "together": together, "seed": seed}
        self.found: TraceEstimate | None = None

    def compute(self) -> Tensor:
        """The trace."""
        self.found = hessian_trace(**self._arguments, **self.settings)
        return self.found.value


class MSharpness(SharpnessMetric):
    """Mean rise of the loss over groups of m samples, after a climb of radius ρ along the group's own gradient.

    See :class:`SharpnessMetric` for what is stored, and :func:`torchlethe.functional.m_sharpness` for the definition.
    The weights are moved for the second pass and put back bit for bit. Groups are runs of m stored samples: under DDP
    each rank must store whole groups, or the groups are others than in one process.

    Args:
        network: maps images to logits.
        rho: radius ρ.
        m: samples in a group; ``None`` takes all samples of all ranks as one.
        adaptive: ``None`` for SAM's climb, ``w2`` or ``eta`` for ASAM's.
        eta: η of ``adaptive="eta"``.
        loss: mean over a batch; cross-entropy by default.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Float64 scalar, in nats for cross-entropy.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> network = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(network.weight)
        >>> metric = MSharpness(network, rho=0.5, m=2, loss=nn.functional.mse_loss)
        >>> metric.update(torch.ones(4, 1), torch.zeros(4, 1))
        >>> round(metric.compute().item(), 6)
        1.25
    """

    def __init__(
        self,
        network: nn.Module,
        rho: float = 0.05,
        m: int | None = 128,
        adaptive: Adaptive | None = None,
        eta: float = 0.01,
        loss: Loss | None = None,
        **kwargs: Any,
    ) -> None:
        check_climb(rho, m, adaptive, eta)
        super().__init__(network, loss, **kwargs)
        self.settings: dict[str, Any] = {"rho": rho, "m": m, "adaptive": adaptive, "eta": eta}

    def compute(self) -> Tensor:
        """The mean rise."""
        return m_sharpness(**self._arguments, **self.settings)
