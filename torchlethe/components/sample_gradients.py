"""Gradients of a classifier in eval mode, by batch, by sample and along directions: what one-shot editors measure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many, gather_in_order, world_size
from torchlethe.components.modes import eval_mode
from torchlethe.data import PADDING_LABEL, model_input

SampleLoss = Callable[[Tensor, Tensor], Tensor]


def sample_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, 0 for padding: ``(B, K)`` and ``(B,)`` to ``(B,)``."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING_LABEL)


def output_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared length of each sample's logits, 0 for padding; the labels are not used otherwise."""
    return logits.square().sum(1) * (labels != PADDING_LABEL)


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def zeros_like(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Accumulators in at least float32: in bf16 a sum over hundreds of batches loses what each adds."""
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]


def plain_batch(raw: Any) -> dict[str, Tensor]:
    """Images and labels of a batch as tensors that autograd can use, also inside an evaluation loop."""
    batch = model_input(raw)
    return {name: batch[name].clone() if batch[name].is_inference() else batch[name] for name in ("image", "label")}


def regrouped(batches: Iterable[Any], size: int) -> Iterator[dict[str, Tensor]]:
    """The same samples in the same order in batches of another size; the last one may be short.

    Args:
        batches: dicts or ``(image, label)`` tuples.
        size: samples of a batch over all ranks; each rank's part is ``size`` divided by their number, at least 1.
    """
    size = max(1, size // world_size())
    image: Tensor | None = None
    label: Tensor | None = None
    for raw in batches:
        batch = plain_batch(raw)
        image = batch["image"] if image is None else torch.cat([image, batch["image"]])
        label = batch["label"] if label is None else torch.cat([label, batch["label"]])
        while len(label) >= size:
            yield {"image": image[:size], "label": label[:size]}
            image, label = image[size:], label[size:]
    if image is not None and label is not None and len(label):
        yield {"image": image, "label": label}


def batch_gradients(
    network: nn.Module, batches: Iterable[Any], loss: SampleLoss = sample_cross_entropy
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each batch the gradient of the summed loss, and the number of samples.

    Args:
        network: maps images to logits; it runs in eval mode.
        batches: on the network's device.
        loss: per-sample loss from logits and labels.

    Yields:
        A tensor for each trainable parameter, in at least float32, and the count: both summed over ranks.
    """
    parameters = list(trainable(network).values())
    for raw in batches:
        # not around the yield: between two batches the network's mode is the caller's
        with eval_mode(network), torch.inference_mode(False), torch.enable_grad():
            batch = plain_batch(raw)
            total = loss(_float(network(batch["image"])), batch["label"]).sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
            found32 = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
            result = all_reduce_sum_many(found32), all_reduce_sum((batch["label"] != PADDING_LABEL).sum())
        yield result


def mean_gradient(network: nn.Module, batches: Iterable[Any]) -> tuple[list[Tensor], int]:
    """Gradient of the mean cross-entropy over all samples (of all ranks), and the number of samples.

    Raises:
        ValueError: there are no batches.
    """
    sums = zeros_like(trainable(network).values())
    count = torch.zeros((), dtype=torch.long)
    for gradients, samples in batch_gradients(network, batches):
        torch._foreach_add_(sums, gradients)
        count = count.to(samples.device) + samples
    if not (samples_seen := int(count)):
        raise ValueError("the gradient needs at least one batch, the loader gave none.")
    torch._foreach_div_(sums, samples_seen)
    return sums, samples_seen


def per_sample_gradients(
    network: nn.Module, batches: Iterable[Any], chunk_size: int = 64
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Gradients of the log-probability of each sample's label, by ``vmap``.

    Args:
        network: maps images to logits; it runs in eval mode.
        batches: on the network's device.
        chunk_size: samples whose gradients are held at once; memory is ``chunk_size`` × parameters.

    Yields:
        For each chunk of this rank's samples a list of ``(b, *shape)`` gradients, one for each trainable parameter, and
        whether each sample is none of the padding, ``(b,)`` bool.
    """
    weights, rest = _parts(network)

    def log_probability(current: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (current, *rest), (image.unsqueeze(0),))[0]
        # selecting by gather, as vmap cannot index with a tensor
        return torch.log_softmax(logits, 0).gather(0, label.clamp_min(0).unsqueeze(0)).squeeze(0)

    per_sample = vmap(grad(log_probability), in_dims=(None, 0, 0), randomness="different")
    for raw in batches:
        batch = plain_batch(raw)
        parts = zip(batch["image"].split(chunk_size), batch["label"].split(chunk_size), strict=True)
        for images, labels in parts:
            with eval_mode(network), torch.inference_mode(False):
                gradients = per_sample(weights, images, labels)
            yield [gradients[name] for name in weights], labels != PADDING_LABEL


def directional_derivatives(
    network: nn.Module, batches: Iterable[Any], directions: list[list[Tensor]], limit: int | None = None
) -> Tensor:
    """Each sample's cross-entropy gradient times given directions, by forward-mode differentiation.

    Nothing of the size of a gradient is stored: one pass over the data for each direction, in batches.

    Args:
        network: maps images to logits; it runs in eval mode.
        batches: on the network's device.
        directions: tensors like the trainable parameters, for each direction.
        limit: stop after so many samples over all ranks; None takes all.

    Returns:
        ``(N, directions)``, in the order of the samples of one process that reads all ranks' data; no padding.
    """
    weights, rest = _parts(network)
    rows: list[Tensor] = []
    seen = 0
    for raw in batches:
        if limit is not None and seen >= limit:
            break
        batch = plain_batch(raw)

        def losses(current: dict[str, Tensor], batch: dict[str, Tensor] = batch) -> Tensor:
            logits = functional_call(network, (current, *rest), (batch["image"],))
            return sample_cross_entropy(_float(logits), batch["label"])

        with _forward_mode(network):
            found = [
                jvp(losses, (weights,), ({n: d.to(w) for (n, w), d in zip(weights.items(), direction, strict=True)},))
                for direction in directions
            ]
        values = torch.stack([result[1] for result in found], 1).detach().double()
        rows.append(torch.cat([values, (batch["label"] == PADDING_LABEL).double().unsqueeze(1)], 1))
        seen += len(values) * world_size()
    if not rows:
        raise ValueError("the derivatives need at least one batch, the loader gave none.")
    table = gather_in_order(torch.cat(rows))
    return table[table[:, -1] == 0, :-1][:limit]


def curvature_product(
    network: nn.Module,
    batches: Iterable[Any],
    vector: list[Tensor],
    kind: Literal["gauss_newton", "empirical"] = "gauss_newton",
) -> list[Tensor]:
    r"""A curvature matrix of the mean cross-entropy times a vector, summed over ranks; no matrix is formed.

    Args:
        network: maps images to logits; it runs in eval mode.
        batches: on the network's device; read once.
        vector: tensors like the trainable parameters.
        kind: ``gauss_newton``, the Gauss-Newton matrix, which is the Fisher information under the network's own
            predictions; or ``empirical``, :math:`\frac1N \sum_n g_n g_n^\top` of the samples' gradients at their
            labels. Both are positive semi-definite wherever the network is.

    Returns:
        Tensors like ``vector``.
    """
    weights, rest = _parts(network)
    sums, count = zeros_like(weights.values()), torch.zeros((), dtype=torch.long)
    tangents = {name: v.to(w) for (name, w), v in zip(weights.items(), vector, strict=True)}
    for raw in batches:
        batch = plain_batch(raw)

        def logits_of(current: dict[str, Tensor], image: Tensor = batch["image"]) -> Tensor:
            return functional_call(network, (current, *rest), (image,))

        with _forward_mode(network):
            logits, moved, *_ = jvp(logits_of, (weights,), (tangents,))
            p = torch.softmax(_float(logits), 1)
            valid = batch["label"] != PADDING_LABEL
            if kind == "empirical":
                residual = p - F.one_hot(batch["label"].clamp_min(0), p.shape[1]).to(p.dtype)
                curved = residual * (residual * moved).sum(1, keepdim=True) * valid.unsqueeze(1)
            else:
                curved = (p * moved - p * (p * moved).sum(1, keepdim=True)) * valid.unsqueeze(1)
            back = vjp(logits_of, weights)[1](curved.to(logits.dtype))[0]
        torch._foreach_add_(sums, [back[name].detach().to(t.dtype) for name, t in zip(weights, sums, strict=True)])
        count = count.to(valid.device) + valid.sum()
    sums = all_reduce_sum_many(sums)
    torch._foreach_div_(sums, float(all_reduce_sum(count)))
    return sums


def expected_squared_gradients(
    network: nn.Module, batches: Iterable[Any], class_chunk: int = 16
) -> tuple[list[Tensor], Tensor]:
    r"""Mean over batches of :math:`\sum_y \bar p(y)\,(\partial\,\overline{\mathrm{CE}}(\text{label } y))^2`.

    For each batch and class the gradient as if all its samples had that label, squared, weighted by the batch's mean
    probability of the class (Golatkar et al., CVPR 2020, as coded). One forward pass; on a GPU one batched backward
    pass, on a CPU one for each class.

    Args:
        network: maps images to logits; it runs in eval mode.
        batches: on the network's device; the result depends on their size.
        class_chunk: classes whose gradients are held at once on a GPU; memory is ``class_chunk`` × parameters.

    Returns:
        A tensor for each trainable parameter, and the number of samples of each class, ``(K,)``.

    Raises:
        ValueError: there are no batches.
    """
    parameters = list(trainable(network).values())
    sums, number, counts = zeros_like(parameters), 0, torch.zeros(0)
    for raw in batches:
        with eval_mode(network), torch.inference_mode(False), torch.enable_grad():
            batch = plain_batch(raw)
            logits = _float(network(batch["image"]))
            valid = batch["label"] != PADDING_LABEL
            classes = logits.shape[1]
            p = torch.softmax(logits.detach(), 1) * valid.unsqueeze(1)
            total = all_reduce_sum(valid.sum()).to(p.dtype)
            share = all_reduce_sum(p.sum(0)) / total
            seen = torch.bincount(batch["label"][valid], minlength=classes)
            counts = seen if number == 0 else counts + seen
            # a CPU gains nothing from several at once, and its batched backward of convolutions is slower
            size = 1 if p.device.type == "cpu" else class_chunk
            for some in torch.eye(classes, dtype=p.dtype, device=p.device).split(size):
                # the derivative of the mean cross-entropy by the logits, for each of these labels: (c, B, K)
                towards = (p - some.unsqueeze(1) * valid.view(1, -1, 1)) / total
                found = torch.autograd.grad(
                    logits,
                    parameters,
                    towards if size > 1 else towards[0],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                    is_grads_batched=size > 1,
                )
                found = found if size > 1 else tuple(g.unsqueeze(0) for g in found)
                found = tuple(all_reduce_sum_many([g.to(t.dtype) for g, t in zip(found, sums, strict=True)]))
                torch._foreach_add_(sums, [torch.tensordot(some @ share, g.square(), 1) for g in found])
        number += 1
    if not number:
        raise ValueError("the Fisher information needs at least one batch, the loader gave none.")
    torch._foreach_div_(sums, number)
    return sums, all_reduce_sum(counts)


@contextmanager
def _forward_mode(network: nn.Module) -> Iterator[None]:
    # fused attention and the fast path of nn.MultiheadAttention have no forward-mode derivative; PyTorch's own first
    # use of these warns of torch.jit
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(network), torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _parts(network: nn.Module) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    weights: dict[str, Tensor] = {name: p.detach() for name, p in trainable(network).items()}
    frozen: dict[str, Tensor] = {n: p.detach() for n, p in network.named_parameters() if n not in weights}
    return weights, (frozen, dict(network.named_buffers()))


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
