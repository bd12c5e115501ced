"""The mean loss of a network over a fixed set of samples, with its gradient and Hessian-vector products.

The batches are read once for each; sums are kept on the device, so nothing waits for it within a sweep. The network's
weights, modes, gradients and buffers are afterwards what they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]

_TWICE = ("differentiat", "derivative", "double backward", ".grad()", "once_differentiable")


@contextmanager
def differentiable_twice(network: nn.Module) -> Iterator[None]:
    """Put a network into the state in which its loss can be differentiated twice; all is undone afterwards.

    Inside: eval mode, gradients on (also within inference mode), no autocast, attention by its plain formula (the fused
    kernels have no second derivative), compiled functions run as written (compiled backward passes have none either),
    recurrent layers without cuDNN.

    Args:
        network: the network.
    """
    modes = [(part, part.training) for part in network.modules()]
    device = next(network.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(part, nn.RNNBase) for part, _ in modes):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            network.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training


class MeanLoss:
    """The mean loss of a network over a fixed set of samples, as a function of its trainable parameters.

    Args:
        network: maps images to what ``loss`` takes; parameters that need no gradient are constants.
        batches: pairs of images (B, …) and labels (B, …) without padding rows, to be iterated over and over: a list, or
            a loader in a fixed order. Batches may have any sizes. They are moved to the network's device.
        loss: maps outputs and labels to the mean over the batch, a scalar; cross-entropy by default.
        reduce: sums a tensor over all ranks, where each has its own share of the samples.

    Raises:
        ValueError: nothing can be differentiated, the precision is too low, or ``batches`` can be read only once.
    """

    def __init__(
        self, network: nn.Module, batches: Batches, loss: Loss | None = None, reduce: Reduce | None = None
    ) -> None:
        named = [(name, value) for name, value in network.named_parameters() if value.requires_grad]
        if not named:
            raise ValueError(f"the network, a {type(network).__name__}, has no parameter that requires a gradient.")
        if low := [name for name, value in named if value.dtype not in (torch.float32, torch.float64)]:
            dtype = str(dict(named)[low[0]].dtype).removeprefix("torch.")
            raise ValueError(f"parameter '{low[0]}' is {dtype}, but second derivatives need float32 or float64.")
        if iter(batches) is batches:
            raise ValueError("batches is an iterator, but it is read many times: give a list or a data loader.")
        self.network, self.batches = network, batches
        self.loss = loss or nn.functional.cross_entropy
        self.reduce = reduce
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [value for _, value in named]
        self.size = sum(value.numel() for value in self.parameters)

    def value(self) -> Tensor:
        """L(w), a float64 scalar."""
        return self._sweep(lambda total: [total.detach()], [wide_zero(self.parameters[0])])[0]

    def gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L(w), a float64 scalar, and ∇L(w), one tensor for each parameter."""
        value, *gradients = self._sweep(
            lambda total: [total.detach(), *self._derivatives(total, create_graph=False)],
            [wide_zero(self.parameters[0]), *(torch.zeros_like(p) for p in self.parameters)],
        )
        return value, gradients

    def hessian_product(self, vectors: Tensor) -> Tensor:
        """H·v for the Hessian H of L at w.

        Args:
            vectors: (V, P) or (P,) over all P trainable entries, in the order of ``network.parameters()``. Vectors of
                one call share the first derivative, which then stays in memory for all.

        Returns:
            The products, in the same shape.

        Raises:
            ValueError: an operation of the network has no second derivative.
        """
        with torch.inference_mode(False):
            rows = [self._unflatten(_usable(vector, vector.device)) for vector in vectors.reshape(-1, self.size)]
        sums = self._sweep(lambda total: [self._products(total, rows)], [torch.zeros_like(vectors)])
        return sums[0].view_as(vectors)

    def _products(self, total: Tensor, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        first = self._derivatives(total, create_graph=True)
        # a constant gradient, as of a parameter that is not used, has no derivative
        used = [number for number, gradient in enumerate(first) if gradient.requires_grad]
        if not used:
            return total.new_zeros(len(rows), self.size)
        products = []
        for row in rows:
            second = torch.autograd.grad(
                [first[number] for number in used],
                self.parameters,
                [row[number] for number in used],
                retain_graph=row is not rows[-1],
                allow_unused=True,
                materialize_grads=True,
            )
            products.append(torch.cat([part.flatten() for part in second]))
        return torch.stack(products)

    def _derivatives(self, total: Tensor, create_graph: bool) -> Sequence[Tensor]:
        return torch.autograd.grad(
            total, self.parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    def _unflatten(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([value.numel() for value in self.parameters])
        return [part.view_as(value) for part, value in zip(parts, self.parameters, strict=True)]

    def _sweep(self, terms: Callable[[Tensor], Sequence[Tensor]], sums: list[Tensor]) -> list[Tensor]:
        """Sum what ``terms`` makes of each batch's summed loss, over batches and ranks, over the number of samples."""
        count = 0
        with differentiable_twice(self.network):
            sums = [torch.zeros_like(part) for part in sums]  # no tensors of inference mode
            for batch in self.batches:
                image, label = (_usable(part, self.parameters[0].device) for part in batch)
                count += len(label)
                total = self.loss(self.network(image), label)
                if total.ndim:
                    raise ValueError(
                        f"loss gives a tensor {tuple(total.shape)}, but must give the mean over the batch."
                    )
                if not total.requires_grad:
                    raise ValueError("loss does not depend on the network's parameters, so it has no derivative.")
                try:
                    for place, term in zip(sums, terms(total * len(label)), strict=True):
                        place += term.view_as(place)
                except RuntimeError as error:
                    if not any(word in str(error) for word in _TWICE):
                        raise
                    reason = str(error).splitlines()[0].rstrip(".")
                    raise ValueError(
                        f"the network, a {type(self.network).__name__}, cannot be differentiated twice: {reason}."
                    ) from error
        if self.reduce is not None:
            sums = [self.reduce(part) for part in sums]
            count = round(self.reduce(wide_zero(self.parameters[0]) + count).item())
        if not count:
            raise ValueError("batches is empty, but at least one sample is needed.")
        return [part / count for part in sums]


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64, except on Apple's, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_zero(like: Tensor) -> Tensor:
    """A zero of the widest floating type of a tensor's device."""
    return torch.zeros((), device=like.device, dtype=widest(like.device))


def _usable(part: Tensor, device: torch.device) -> Tensor:
    moved = part.to(device, non_blocking=True)
    return moved.clone() if moved.is_inference() else moved  # autograd keeps no tensor of inference mode
