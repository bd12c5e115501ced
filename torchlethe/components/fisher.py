"""Diagonal Fisher information of a classifier, one number for each weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from torchlethe.arguments import check_choice
from torchlethe.components.distributed import all_reduce_sum, all_reduce_sum_many
from torchlethe.components.modes import eval_mode
from torchlethe.data import PADDING_LABEL, model_input


class DiagonalFisher:
    r"""Empirical diagonal Fisher information over a loader, in eval mode, with the true labels.

    ``batch`` (the published form) averages the squared *batch-mean* gradients,
    :math:`F_j = \frac1{\#batches}\sum_b (\partial_j \overline{\mathrm{CE}}_b)^2`, so it depends on the batch size and
    order. ``sample`` is :math:`F_j = \frac1N \sum_i (\partial_j \mathrm{CE}_i)^2` and depends on neither; it costs more
    time and memory.

    Args:
        mode: ``batch`` or ``sample``.
        chunk_size: samples whose gradients are held at once in ``sample`` mode; memory is ``chunk_size`` × parameters.

    Raises:
        ValueError: the mode is unknown.

    Note:
        Under DDP every rank passes its shard; gradients are summed over the ranks before they are squared, which
        equals one process with the joined batches. Padding samples (label -100) do not count.
    """

    def __init__(self, mode: Literal["batch", "sample"] = "batch", chunk_size: int = 64) -> None:
        check_choice(("batch", "sample"), mode=mode)
        self.mode = mode
        self.chunk_size = chunk_size

    def estimate(self, network: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Estimate the Fisher information of every trainable parameter.

        Args:
            network: maps images ``(B, C, H, W)`` to logits ``(B, K)``; its mode and gradients are left as they were.
            batches: dicts or ``(image, label)`` tuples on the network's device.

        Returns:
            A non-negative tensor for each trainable parameter, by name, in the parameter's shape and at least float32.

        Raises:
            ValueError: there are no batches.
        """
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        accumulate = self._squared_batch_gradients if self.mode == "batch" else self._squared_sample_gradients
        # evaluation loops run in inference mode, which autograd cannot leave by enable_grad alone
        with eval_mode(network), torch.inference_mode(False):
            sums, count = accumulate(network, parameters, batches)
        if count == 0:
            raise ValueError("the Fisher information needs at least one batch, the loader gave none.")
        torch._foreach_div_(sums, count)
        return dict(zip(parameters, sums, strict=True))

    def _squared_batch_gradients(
        self, network: nn.Module, parameters: dict[str, nn.Parameter], batches: Iterable[Any]
    ) -> tuple[list[Tensor], float]:
        sums = [_accumulator(p) for p in parameters.values()]
        count = 0
        with torch.enable_grad():
            for raw in batches:
                batch = _outside_inference(raw)
                labels = batch["label"]
                loss = F.cross_entropy(network(batch["image"]), labels, reduction="sum", ignore_index=PADDING_LABEL)
                weights = list(parameters.values())
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
                total = all_reduce_sum((labels != PADDING_LABEL).sum())
                summed = [gradient.to(total_.dtype) for gradient, total_ in zip(gradients, sums, strict=True)]
                mean = torch._foreach_div(all_reduce_sum_many(summed), total)
                torch._foreach_addcmul_(sums, mean, mean)
                count += 1
        return sums, count

    def _squared_sample_gradients(
        self, network: nn.Module, parameters: dict[str, nn.Parameter], batches: Iterable[Any]
    ) -> tuple[list[Tensor], float]:
        detached = {name: p.detach() for name, p in parameters.items()}
        buffers = dict(network.named_buffers())
        frozen = {name: p.detach() for name, p in network.named_parameters() if name not in parameters}

        def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(network, (weights, frozen, buffers), (image.unsqueeze(0),))[0]
            # selecting by gather, as vmap cannot index with a tensor; a padding label selects with weight 0
            chosen = torch.log_softmax(logits, 0).gather(0, label.clamp_min(0).unsqueeze(0)).squeeze(0)
            return -chosen * (label != PADDING_LABEL)

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
        sums = [_accumulator(p) for p in detached.values()]
        count = torch.zeros((), dtype=torch.long, device=sums[0].device)
        for raw in batches:
            batch = _outside_inference(raw)
            for images, labels in zip(
                batch["image"].split(self.chunk_size), batch["label"].split(self.chunk_size), strict=True
            ):
                gradients = per_sample(detached, images, labels)
                squares = [
                    gradients[name].to(total.dtype).square().sum(0) for name, total in zip(detached, sums, strict=True)
                ]
                torch._foreach_add_(sums, squares)
                count += (labels != PADDING_LABEL).sum()
        return all_reduce_sum_many(sums), float(all_reduce_sum(count))


def _accumulator(parameter: Tensor) -> Tensor:
    # in bf16 a sum over hundreds of batches loses what each adds
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _outside_inference(batch: Any) -> dict[str, Any]:
    batch = model_input(batch)
    inferred = {key: v.clone() for key, v in batch.items() if isinstance(v, Tensor) and v.is_inference()}
    return batch | inferred
