"""Input sensitivity of a classifier's logits as a torchmetric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from torchlethe.arguments import check_at_least, check_choice
from torchlethe.functional.sensitivity import input_sensitivity
from torchlethe.functional.uncertainty import PADDING_LABEL
from torchlethe.metrics.sharpness import _Borrowed


class InputSensitivity(Metric):
    r"""Mean 2-norm of a logit's gradient with respect to the image, :math:`\|\nabla_x f_k(x)\|`.

    Training raises the sensitivity of a sample's true logit: it is high for samples that were trained on, and a score
    of memorisation (:func:`torchlethe.functional.input_sensitivity` gives it for each sample). MU-Mis lowers it. Values
    depend on the scale of images and logits: compare networks on the same images in the same scale.

    The network is borrowed: it is no submodule, its weights are not in the metric's state, and it keeps its modes,
    gradients and buffers. Eval mode, no autocast; works in test loops, where inference mode is left by itself. Under
    DDP sums and counts are added over ranks; images that pad the last batches (label -100) do not count.

    Args:
        network: maps images to logits (B, C); a LightningModule may give itself.
        num_classes: C, at least 2.
        logit: whose gradient: the true class (``label``), the mean over all others (``other``), or the class with the
            largest logit (``predicted``).
        per_class: one mean for each true class in place of one for all.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns (compute):
        Float64 scalar, or (C,) with ``per_class``; NaN where there was no image.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> network = nn.Linear(2, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> metric = InputSensitivity(network, num_classes=2)
        >>> metric.update(torch.rand(3, 2), torch.tensor([0, 0, 1]))
        >>> round(metric.compute().item(), 4)
        3.6667
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    total: Tensor
    count: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        logit: Literal["label", "other", "predicted"] = "label",
        per_class: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise ValueError(f"network is a {type(network).__name__}, it must be a torch.nn.Module.")
        check_at_least(2, num_classes=num_classes)
        check_choice(("label", "other", "predicted"), logit=logit)
        super().__init__(**kwargs)
        self._borrowed = _Borrowed(network, None)
        self.num_classes, self.logit, self.per_class = num_classes, logit, per_class
        self.add_state("total", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, image: Tensor, label: Tensor) -> None:
        """Measure a batch.

        Args:
            image: (B, …), as the network takes it.
            label: (B,) classes in 0…C-1, or -100 for padding.
        """
        real = label != PADDING_LABEL
        image, label = image[real], label[real].long()
        if not len(label):
            return
        norms = input_sensitivity(self._borrowed.network, image, self._classes(image, label)).double().mean(1)
        self.total += torch.zeros_like(self.total).index_add_(0, label, norms)
        self.count += torch.bincount(label, minlength=self.num_classes)

    def _classes(self, image: Tensor, label: Tensor) -> Tensor:
        if self.logit == "label":
            return label.unsqueeze(1)
        if self.logit == "other":
            offsets = torch.arange(1, self.num_classes, device=label.device)
            return (label.unsqueeze(1) + offsets) % self.num_classes
        network = self._borrowed.network
        modes = [(part, part.training) for part in network.modules()]
        try:
            with torch.no_grad():
                return network.eval()(image).argmax(1, keepdim=True)
        finally:
            for part, training in modes:
                part.training = training

    def compute(self) -> Tensor:
        """The mean, of all images or of each class."""
        if self.per_class:
            return self.total / self.count
        return self.total.sum() / self.count.sum()
