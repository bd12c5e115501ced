"""Faster networks by configuration: memory layout and compilation."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ChannelsLast(Callback):
    """Store convolution weights channels-last, which tensor cores and CPU convolutions prefer.

    Images need no change: a convolution takes its layout from its weights. On a CPU the classifier modules do this by
    themselves with the networks of this package, torchvision and timm; the callback is for GPUs and other networks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module before it is moved to its device."""
        pl_module.to(memory_format=torch.channels_last)


class CompileNetwork(Callback):
    """Compile the module's ``network`` in place with ``torch.compile``; names in checkpoints stay as they are.

    Args:
        mode: as in ``torch.compile``: ``default``, ``reduce-overhead`` or ``max-autotune``.
        dynamic: whether shapes may vary without recompiling; by default the last short batch compiles once more.
        backend: as in ``torch.compile``.

    Raises:
        ValueError: the module has no ``network``, or says that it cannot be compiled (``compilable = False``).
    """

    def __init__(self, mode: str = "default", dynamic: bool | None = None, backend: str = "inductor") -> None:
        # other backends know no modes
        self.options = {"backend": backend, "dynamic": dynamic} | ({"mode": mode} if backend == "inductor" else {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile before the first batch."""
        network = getattr(pl_module, "network", None)
        if not isinstance(network, torch.nn.Module):
            raise ValueError(f"CompileNetwork needs a module with a 'network', {type(pl_module).__name__} has none.")
        if not getattr(pl_module, "compilable", True):
            raise ValueError(f"{type(pl_module).__name__} cannot be compiled; remove the CompileNetwork callback.")
        network.compile(**self.options)
