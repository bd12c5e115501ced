"""MSG, CT and CFW: disturb the convolutions once, then repair on the remaining data.

Source: the unlearning challenge of NeurIPS 2023, as collected in Cadet, Borovykh, Malekzadeh, Ahmadi-Abhari, Haddadi,
"Deep Unlearn: Benchmarking Machine Unlearning", 2024, https://arxiv.org/abs/2410.01276, code
https://github.com/xcadet/deepunlearn. There are no published numbers to agree with; choices of ours are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from torchlethe.arguments import check_at_least, check_within
from torchlethe.components.originals import randomised_copy
from torchlethe.components.sample_gradients import mean_gradient, trainable
from torchlethe.data import Feed, PositionedLoader, Single
from torchlethe.data.hashing import generator_for
from torchlethe.updates.base import BatchNormMode, LossUpdate, OptimizerFactory, cross_entropy, default_optimizer

_CONVOLUTIONS = nn.modules.conv._ConvNd


def kernels(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights of a network's convolutions, by name.

    Raises:
        ValueError: there are none.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _CONVOLUTIONS)]
    weights = [(f"{name}.weight" if name else "weight", layer.weight) for name, layer in layers]
    found = {name: weight for name, weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad}
    if not found:
        raise ValueError(f"the network {type(network).__name__} has no convolution, which this method changes.")
    return found


class DisturbThenRepair(LossUpdate):
    """What the three share: ``disturb`` changes the convolutions before the first step, cross-entropy repairs.

    Args:
        optimizer: makes the optimizer from the parameters.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.
    """

    def __init__(self, optimizer: OptimizerFactory = default_optimizer, bn_mode: BatchNormMode = "train") -> None:
        super().__init__(optimizer, bn_mode)
        self.feed: Feed = Single("remain")

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters.

        Raises:
            ValueError: the network has no convolution.
        """
        self.prepared, self.kernels = False, kernels(network)
        return super().configure(network)

    def disturb(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> None:
        """Change the convolutions in place; the same on every rank."""
        raise NotImplementedError

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Disturb."""
        before = [kernel.detach().clone() for kernel in self.kernels.values()]
        with torch.no_grad():
            self.disturb(network, loaders)
            change = torch._foreach_sub([kernel.detach() for kernel in self.kernels.values()], before)
        lengths = [torch.stack(torch._foreach_norm(part)).norm() for part in (list(change), before)]
        return super().prepare(network, loaders) | {"kernel_change": float(lengths[0] / lengths[1].clamp_min(1e-30))}

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of a remaining batch."""
        if isinstance(batch, dict) and "remain" in batch:
            batch = batch["remain"]
        with self.batch_norm(network):
            loss = cross_entropy(network, batch)
        return loss, {"remain_loss": loss.detach()}


class CTUpdate(DisturbThenRepair):
    """CT: transpose the two spatial axes of every square kernel, then fine-tune on the remaining data.

    Args:
        optimizer: makes the optimizer from the parameters.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Note:
        Kernels of one position, and such as are not square, stay as they are; a network with no other is refused.
    """

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """See :meth:`DisturbThenRepair.configure`."""
        optimizers = super().configure(network)
        shapes = [tuple(kernel.shape[2:]) for kernel in self.kernels.values()]
        if not any(len(shape) == 2 and shape[0] == shape[1] > 1 for shape in shapes):
            raise ValueError(
                f"no kernel of {type(network).__name__} is square and larger than 1, so none can be transposed."
            )
        return optimizers

    def disturb(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> None:
        """Transpose."""
        for kernel in self.kernels.values():
            if kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3]:
                kernel.copy_(kernel.transpose(2, 3).clone())


class CFWUpdate(DisturbThenRepair):
    """CFW: add noise to the kernels, fine-tune on the remaining data, add weaker noise before the last epoch.

    Args:
        optimizer: makes the optimizer from the parameters.
        noise: standard deviation of the first noise, at least 0.
        last_noise: that of the noise before the last epoch, at least 0; a run of one epoch has none.
        seed: both noises are functions of it, the same on all ranks and devices.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        noise: float = 0.6,
        last_noise: float = 0.005,
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_at_least(0, noise=noise, last_noise=last_noise)
        self.noise, self.last_noise, self.seed = noise, last_noise, seed

    def disturb(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> None:
        """Add the first noise."""
        self._add(self.noise, 0)

    @torch.no_grad()
    def _add(self, scale: float, number: int) -> None:
        generator = generator_for("kernel noise", self.seed, number)
        for kernel in self.kernels.values():
            kernel.add_(torch.randn(kernel.shape, generator=generator).to(kernel), alpha=scale)

    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of a remaining batch."""
        self.required_length()  # says in the first step, not in the last epoch, that nobody told it
        return super().loss(network, batch, k)

    def after_optimizer_step(self, k: int) -> None:
        """Add the second noise when the last epoch is next."""
        steps, per_epoch = self.required_length()
        if self.last_noise and 0 < k + 1 == steps - per_epoch:
            self._add(self.last_noise, 1)


@dataclass(frozen=True)
class RemainBesidesForget(Feed):
    """A pass over the remaining data an epoch; the forget set is named for measurements before."""

    @override
    def length(self, batches: Mapping[str, int]) -> int:
        return batches["remain"]

    @override
    def plan(self, batches: Mapping[str, int], epoch: int = 0) -> Iterator[dict[str, int]]:
        start = epoch * batches["remain"]
        return ({"remain": start + k} for k in range(batches["remain"]))

    @override
    def loader(
        self, role_set: Callable[[str], Any], batch_size: int, seed: int = 0, **kwargs: Any
    ) -> PositionedLoader | None:
        return PositionedLoader(role_set("remain"), batch_size=batch_size, shuffle=True, seed=seed, **kwargs)


class MSGUpdate(DisturbThenRepair):
    r"""MSG: initialise anew the kernel weights on which both sets agree most, then fine-tune with the others held back.

    In each kernel the ``fraction`` of weights with the smallest :math:`|\nabla(CE(D_r) - CE(D_f))|` is drawn as when
    the layer was built; in the fine-tuning on the remaining data the gradients of the kernels' other weights are
    multiplied by ``kept_gradient``.

    Args:
        optimizer: makes the optimizer from the parameters.
        fraction: share of each kernel, in [0, 1].
        kept_gradient: factor on the gradients of the kernels' other weights, at least 0. All parameters that belong to
            no convolution are trained as usual (our reading).
        remain_batches: remaining batches whose gradient is measured, the first ones in stored order; None takes all.
        seed: the new weights are a function of it, the same on all ranks and devices.
        bn_mode: whether BatchNorm uses (and updates) its statistics from the batches: ``train`` or ``eval``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory = default_optimizer,
        fraction: float = 0.3,
        kept_gradient: float = 0.1,
        remain_batches: int | None = None,
        seed: int = 0,
        bn_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(optimizer, bn_mode)
        check_within(0, 1, fraction=fraction)
        check_at_least(0, kept_gradient=kept_gradient)
        if remain_batches is not None:
            check_at_least(1, remain_batches=remain_batches)
        self.fraction, self.kept_gradient, self.remain_batches, self.seed = (
            fraction,
            kept_gradient,
            remain_batches,
            seed,
        )
        self.feed = RemainBesidesForget()
        self.factors: list[Tensor] = []

    def disturb(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> None:
        """Choose the weights and initialise them anew."""
        remain, _ = mean_gradient(network, _first(loaders["remain"], self.remain_batches))
        forget, _ = mean_gradient(network, loaders["forget"])
        scores = dict(zip(trainable(network), torch._foreach_sub(remain, forget), strict=True))
        fresh = dict(randomised_copy(network, self.seed).named_parameters())
        self.factors = []
        for name, kernel in self.kernels.items():
            flat = scores[name].abs().flatten()
            chosen = torch.zeros_like(flat, dtype=torch.bool)
            chosen[flat.argsort(stable=True)[: int(self.fraction * flat.numel())]] = True
            chosen = chosen.view_as(kernel)
            kernel.copy_(torch.where(chosen, fresh[name].to(kernel), kernel))
            self.factors.append(torch.where(chosen, 1.0, self.kept_gradient).to(kernel))

    def before_optimizer_step(self) -> None:
        """Hold the gradients of the kernels' other weights back."""
        if not self.factors:
            raise RuntimeError("MSGUpdate took a step before prepare(network, loaders).")
        pairs = [(p.grad, f) for p, f in zip(self.kernels.values(), self.factors, strict=True) if p.grad is not None]
        torch._foreach_mul_([gradient for gradient, _ in pairs], [factor for _, factor in pairs])

    def state_dict(self) -> dict[str, Any]:
        """Which weights were drawn anew, as booleans."""
        return super().state_dict() | {"drawn": [factor == 1 for factor in self.factors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        pairs = zip(state["drawn"], self.kernels.values(), strict=True) if state["drawn"] else ()
        self.factors = [torch.where(drawn.to(p.device), 1.0, self.kept_gradient).to(p) for drawn, p in pairs]


def _first(batches: Iterable[Any], count: int | None) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if count is not None and number >= count:
            return
        yield batch
