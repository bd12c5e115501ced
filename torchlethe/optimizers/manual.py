"""A sharpness-aware step in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.components import SharpnessEngine
from torchlethe.optimizers import two_pass
from torchlethe.optimizers.base import SharpnessAwareOptimizer


def sam_step(
    optimizer: Any,
    closure: Callable[[], Tensor],
    engine: SharpnessEngine,
    module: nn.Module | None = None,
) -> Tensor:
    """One sharpness-aware step in a training loop of your own, for example under Lightning's manual optimization.

    The closure runs forward and backward on one batch and returns the loss; it is called twice. ``optimizer.step()`` is
    called once, so under Lightning ``global_step`` counts one. The engine is kept from step to step; to resume exactly,
    store ``engine.state_dict(names)`` in ``on_save_checkpoint``, with ``names`` from parameter to name.

    Example::

        def training_step(self, batch, batch_idx):
            def closure():
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            loss = sam_step(self.optimizers(), closure, self.engine, module=self)

    Args:
        optimizer: a torch, Lightning or Fabric optimizer around a plain base optimizer.
        closure: forward, backward (``self.manual_backward`` under Lightning), returns the loss.
        engine: the method.
        module: the network, when the second pass is to leave its running statistics alone.

    Returns:
        The loss at w, detached.

    Raises:
        ValueError: the optimizer makes two passes of its own, or gradients are scaled for fp16.
        NonFiniteGradientError: as :meth:`SharpnessAwareOptimizer.step`.

    Note:
        Under DDP both passes are averaged over ranks by the closure's backward.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, SharpnessAwareOptimizer):
        raise ValueError(
            f"optimizer is a {type(inner).__name__}, which makes two passes itself: use its step(closure)."
        )
    if not isinstance(inner, Optimizer):
        raise ValueError(
            f"optimizer is a {type(inner).__name__}, it must be one optimizer of torch, Lightning or Fabric."
        )
    strategy = getattr(optimizer, "_strategy", None)
    precisions = (getattr(strategy, name, None) for name in ("precision_plugin", "precision"))  # Lightning's, Fabric's
    if any(getattr(precision, "scaler", None) is not None for precision in precisions):
        raise ValueError("precision is 16-mixed, but sam_step sees scaled gradients: use bf16-mixed.")
    groups, step = inner.param_groups, engine.steps
    two_pass.clear(groups)
    loss = closure()
    if engine.two_passes(step):
        two_pass.second_pass(groups, engine, step, _everything, closure, module)
    else:
        two_pass.one_pass(engine, groups)
    optimizer.step()
    engine.after_step(groups)
    two_pass.clear(groups)
    engine.steps += 1
    return loss.detach()


def _everything(param: Tensor) -> bool:
    """Perturb every parameter."""
    return True
