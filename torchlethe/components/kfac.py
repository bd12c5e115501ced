"""Kronecker-factored curvature: an inverse of the Fisher information that is cheap to apply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many
from torchlethe.components.modes import eval_mode
from torchlethe.components.sample_gradients import plain_batch, sample_cross_entropy, trainable, zeros_like
from torchlethe.data import PADDING_LABEL, mix_seed, random_bits


class KroneckerFisher:
    r"""The Fisher information of a classifier, one block a layer, each block a Kronecker product of two small matrices.

    For a linear layer with inputs a (a 1 appended where it has a bias) and gradients g by its outputs the block is
    :math:`A \otimes G` with :math:`A = E[a a^\top]` and :math:`G = E[g g^\top]`; for a convolution a are its patches,
    summed over positions in A and averaged in G. Labels are drawn from the network's own predictions, once for each
    sample. Other parameters (normalisation, tokens, layers that run twice in a pass, inside fused operations or on
    something else than samples) have a diagonal, the mean over samples of the squared gradients, estimated from batch
    sums: the labels' randomness makes the cross terms vanish on average.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015,
    https://arxiv.org/abs/1503.05671; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers", ICML 2016, https://arxiv.org/abs/1602.01407. The damping is split between the factors as in the
    first paper, section 6.3.

    Args:
        network: the classifier; it is measured in eval mode.
        batches: on the network's device, at least one.
        seed: of the drawn labels, which are a function of it and of the samples' ``index`` (or position).

    Raises:
        ValueError: there are no batches.

    Note:
        Memory is the two factors of each layer, (inputs × kernel area)² and outputs². Under DDP the factors are summed
        over ranks; with the ``index`` in the batches they are those of one process with the joined batches, but for the
        diagonal, whose batch sums are a rank's own.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> fisher = KroneckerFisher(network, [(torch.rand(5, 1, 2, 2), torch.arange(5) % 3)])
        >>> [tuple(factor.shape) for factor in fisher.factors["1"]]
        [(5, 5), (3, 3)]
    """

    def __init__(self, network: nn.Module, batches: Iterable[Any], seed: int = 0) -> None:
        self.names = list(trainable(network))
        self.layers = {name: layer for name, layer in network.named_modules() if _factored(layer)}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.positions: dict[str, int] = {}
        self.diagonal = dict(zip(self.names, zeros_like(trainable(network).values()), strict=True))
        self._measure(network, batches, seed)

    def _measure(self, network: nn.Module, batches: Iterable[Any], seed: int) -> None:
        count, seen, dropped = torch.zeros((), dtype=torch.long), 0, set[str]()
        for raw in batches:
            with eval_mode(network), torch.inference_mode(False), torch.enable_grad(), self._listening() as calls:
                batch = plain_batch(raw)
                logits = network(batch["image"])
                valid = batch["label"] != PADDING_LABEL
                index = raw.get("index") if isinstance(raw, dict) else None
                index = index.clone() if index is not None else seen + torch.arange(len(valid), device=valid.device)
                drawn = _draw(logits.detach(), index, seed).masked_fill(~valid, PADDING_LABEL)
                loss = sample_cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), drawn).sum()
                dropped |= {name for name in self.layers if not _once_a_sample(calls.get(name, ()), len(valid))}
                used = [name for name in self.layers if name not in dropped]
                outputs = [calls[name][0][1] for name in used]
                weights = list(trainable(network).values())
                found = torch.autograd.grad(loss, [*outputs, *weights], allow_unused=True, materialize_grads=True)
            for name, gradient in zip(used, found, strict=False):
                self._add(name, calls[name][0][0], gradient, valid)
            for name, gradient in zip(self.names, found[len(used) :], strict=True):
                self.diagonal[name] += gradient.to(self.diagonal[name].dtype).square()
            count = count.to(valid.device) + valid.sum()
            seen += len(valid)
        samples = int(all_reduce_sum(count))
        if not samples:
            raise ValueError("the curvature needs at least one batch, the loader gave none.")
        flat = all_reduce_sum_many([factor for pair in self.factors.values() for factor in pair])
        pairs = zip(flat[::2], flat[1::2], strict=True)
        self.factors = {
            name: (a / samples, g / (samples * self.positions[name]))
            for name, (a, g) in zip(self.factors, pairs, strict=True)
            if name not in dropped
        }
        totals = all_reduce_sum_many(list(self.diagonal.values()))
        self.diagonal = {name: total / samples for name, total in zip(self.names, totals, strict=True)}

    @contextmanager
    def _listening(self) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """What each layer reads and writes inside the block."""
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        names = {layer: name for name, layer in self.layers.items()}

        def note(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            calls.setdefault(names[layer], []).append((inputs[0].detach(), output))
            return output.clone()  # an activation in place would change what was noted

        handles = [layer.register_forward_hook(note) for layer in self.layers.values()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, read: Tensor, gradient: Tensor, valid: Tensor) -> None:
        """Add a batch to both factors of a layer."""
        layer: Any = self.layers[name]
        dtype = torch.promote_types(read.dtype, torch.float32)
        if isinstance(layer, nn.Conv2d):
            sizes: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            a = F.unfold(read.to(dtype), *sizes).transpose(1, 2)
            g = gradient.to(dtype).flatten(2).transpose(1, 2)
        else:
            a, g = (t.to(dtype).reshape(len(valid), -1, t.shape[-1]) for t in (read, gradient))
        if layer.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        a = a * valid.view(-1, 1, 1)
        self.positions[name] = a.shape[1]
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        products = (a.T @ a, g.T @ g)
        old = self.factors.get(name)
        self.factors[name] = products if old is None else (old[0] + products[0], old[1] + products[1])

    def solve(self, vector: list[Tensor], damping: float) -> list[Tensor]:
        """Apply the inverse of the damped approximation.

        Args:
            vector: tensors like the trainable parameters.
            damping: added to the diagonal, above 0.

        Returns:
            Tensors like ``vector``.
        """
        given = dict(zip(self.names, vector, strict=True))
        found = {name: v / (self.diagonal[name].to(v) + damping) for name, v in given.items()}
        for name, (a, g) in self.factors.items():
            weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
            rows = given[weight].flatten(1)
            if has_bias := bias in given:
                rows = torch.cat([rows, given[bias].unsqueeze(1)], 1)
            rows = rows.to(a.dtype)
            # the damping's root goes to each factor in proportion to its mean eigenvalue
            ratio = ((a.trace() / len(a)) / (g.trace() / len(g)).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
            root = damping**0.5
            rows = torch.linalg.solve(_damped(g, root / ratio), rows)
            rows = torch.linalg.solve(_damped(a, root * ratio), rows.T).T
            found[weight] = (rows[:, :-1] if has_bias else rows).reshape(given[weight].shape).to(given[weight])
            if has_bias:
                found[bias] = rows[:, -1].to(given[bias])
        return [found[name] for name in self.names]


def _once_a_sample(calls: Sequence[tuple[Tensor, Tensor]], samples: int) -> bool:
    """Whether a layer ran once in a pass, on rows that belong to samples; a table of positions does not."""
    return len(calls) == 1 and len(calls[0][0]) % samples == 0


def _damped(matrix: Tensor, amount: Tensor) -> Tensor:
    return matrix + amount * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _factored(layer: nn.Module) -> bool:
    """Whether a layer's Fisher information is factored: all of its own parameters are trained, in the usual way."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or not all(
        p.requires_grad for p in layer.parameters(recurse=False)
    ):
        return False
    plain = type(layer) is nn.Linear or type(layer) is nn.Conv2d
    return plain and (
        isinstance(layer, nn.Linear)
        or (layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
    )


def _draw(logits: Tensor, index: Tensor, seed: int) -> Tensor:
    """A label (B,) for each sample from its predicted distribution, a function of the seed and the index."""
    uniform = random_bits(mix_seed(seed, *b"drawn label"), 0, index, 1).double() / 2**32
    steps = torch.softmax(logits.double(), 1).cumsum(1)
    return torch.searchsorted(steps, uniform).squeeze(1).clamp_max(logits.shape[1] - 1)
