"""SAM and its relatives as optimizers; each is its engine's options with documented defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from torchlethe.components import SharpnessEngine, normalisation_parameters
from torchlethe.optimizers.base import BaseOptimizer, SharpnessAwareOptimizer


class SAM(SharpnessAwareOptimizer):
    """Sharpness-aware minimisation (arXiv:2010.01412): the gradient at the top of a climb along the gradient.

    Args:
        params: parameters, ``model.named_parameters()``, or parameter groups (which may have a ``rho`` of their own).
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        interval: two passes every so many steps, one between them.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(8, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> bool(optimizer.step(closure) < first)
        True
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("sam", rho, interval=interval)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class ASAM(SharpnessAwareOptimizer):
    """Adaptive SAM (arXiv:2102.11600): a climb scaled by the weights, so that rescaling layers changes nothing.

    Args:
        params: as for :class:`SAM`; ``variant="eta"`` needs ``model.named_parameters()``.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive; 0.5 for CIFAR-10, 1 for CIFAR-100 with ``eta``, about 2 with ``w2``.
        variant: ``eta`` as its authors do it (SamsungLabs/ASAM): |w| + eta for parameters with "weight" in their name,
            1 for others; ``w2`` |w| throughout, as davda54/sam does it.
        eta: added to |w|.
        interval: two passes every so many steps, one between them.
        module: the network, see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float | None = None,
        variant: Literal["eta", "w2"] = "eta",
        eta: float = 0.01,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("asam", rho, adaptive=variant, eta=eta, interval=interval)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)
        if variant == "eta" and "param_names" not in self.param_groups[0]:
            raise ValueError("variant='eta' needs the names of the parameters: pass model.named_parameters().")


class FriendlySAM(SharpnessAwareOptimizer):
    """F-SAM (arXiv:2403.12350): a climb along the batch's own noise, the gradient without its moving average.

    Args:
        params: parameters, ``model.named_parameters()``, or parameter groups (which may have a ``rho`` of their own).
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive; 0.2 for CIFAR-100 with ResNet-18 (nblt/F-SAM's script).
        sigma: share of the average that is removed; 0 gives SAM.
        lmbda: decay of the average; 0.6 in the published script, 0.9 in the official class.
        adaptive: scale the climb by the weights: ``w2`` or ``eta``, see :class:`ASAM` (F-ASAM).
        order: ``code`` removes the average from before the batch, ``paper`` the one after it.
        min_noise_ratio: no climb where ‖d‖ is below this share of ‖g‖.
        interval: two passes every so many steps; the average follows in the others too.
        memory_dtype: dtype of the average, or its name, such as "bfloat16"; the gradient's by default.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: Literal["eta", "w2"] | None = None,
        order: Literal["code", "paper"] = "code",
        min_noise_ratio: float = 0.0,
        interval: int = 1,
        memory_dtype: torch.dtype | str | None = None,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine(
            "fsam",
            rho,
            adaptive=adaptive,
            interval=interval,
            memory_dtype=memory_dtype,
            sigma=sigma,
            lmbda=lmbda,
            order=order,
            min_noise_ratio=min_noise_ratio,
        )
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class VaSSO(SharpnessAwareOptimizer):
    """Variance-suppressed SAM (arXiv:2309.15639): a climb along the moving average of the gradients.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        theta: weight of the new gradient in the average, in (0, 1].
        interval: two passes every so many steps; the average follows in the others too.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        theta: float = 0.9,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("vasso", rho, interval=interval, theta=theta)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class GSAM(SharpnessAwareOptimizer):
    """Surrogate-gap SAM (arXiv:2203.08065): descends the perturbed loss and its gap to the clean one.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive; with ``rho_schedule="lr"`` its largest value.
        alpha: weight of the part of the clean gradient that is orthogonal to the perturbed one; 0 gives SAM.
        rho_schedule: ``lr`` lets the radius follow the learning rate from ``rho`` to ``rho_end``, as published;
            ``constant`` does not.
        rho_end: radius at a learning rate of 0, or of the parameter group's ``min_lr``.
        interval: two passes every so many steps, one between them.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        alpha: float = 0.4,
        rho_schedule: Literal["constant", "lr"] = "constant",
        rho_end: float = 0.0,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine(
            "gsam", rho, interval=interval, rho_schedule=rho_schedule, rho_end=rho_end, alpha=alpha
        )
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class WSAM(SharpnessAwareOptimizer):
    """Weighted SAM (arXiv:2305.15817): the sharpness as a weighted regulariser.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        gamma: weight in [0, 1); 0 is the base optimizer, 0.5 is SAM.
        decoupled: keep the sharpness out of momentum and moments.
        interval: two passes every so many steps, one between them.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        gamma: float = 0.9,
        decoupled: bool = True,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("wsam", rho, interval=interval, gamma=gamma, decoupled=decoupled)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class LookSAM(SharpnessAwareOptimizer):
    """LookSAM (arXiv:2203.02714): SAM every few steps, between them the remembered difference to the gradient.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        alpha: strength of the remembered difference; 0.7 as published, 0.3 for CIFAR ResNets (AndAgio/mia_bench).
        interval: two passes every so many steps.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        alpha: float = 0.7,
        interval: int = 5,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("looksam", rho, interval=interval, alpha=alpha)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)


class ESAM(SharpnessAwareOptimizer):
    """Efficient SAM (arXiv:2110.03141): perturbs some tensors and runs the second pass on the samples that rise most.

    With ``gamma`` below 1 a step needs to know the samples: ``optimizer.step(closure, losses)``, where ``losses()``
    returns the losses ``(B,)`` of the batch, and the closure takes ``positions``, an index ``(γB,)`` into the batch, or
    None for all of it.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        beta: probability in (0, 1] that a step perturbs a tensor.
        gamma: share in (0, 1] of the samples that make the second pass.
        seed: of the choice of tensors, which is a pure function of seed and step.
        interval: two passes every so many steps, one between them.
        module: see :class:`~torchlethe.optimizers.SharpnessAwareOptimizer`, as the two below.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        interval: int = 1,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        engine = SharpnessEngine("esam", rho, interval=interval, seed=seed, beta=beta, gamma=gamma)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)
        self.gamma = gamma
        self._losses: Callable[[], Tensor] | None = None
        self._clean: Tensor | None = None

    def step(self, closure: Callable[..., Any] | None = None, losses: Callable[[], Tensor] | None = None) -> Any:
        """One step.

        Args:
            closure: zeroes the gradients, runs forward and backward on the samples at ``positions``, returns the loss.
            losses: the losses ``(B,)`` of the whole batch; runs without gradients.

        Returns:
            The loss at w.

        Raises:
            RuntimeError: ``gamma`` is below 1 and ``losses`` is missing.
        """
        if self.gamma < 1 and losses is None:
            raise RuntimeError(
                f"gamma is {self.gamma}, so ESAM chooses samples: call step(closure, losses) with losses() the (B,) "
                "losses of the batch and a closure that takes `positions`; or use the callback "
                "SharpnessAware(method='esam')."
            )
        self._losses = losses if self.gamma < 1 else None
        try:
            self._clean = self._evaluate() if self._losses and self.engine.two_passes(self.engine.steps) else None
            return super().step(closure)
        finally:
            self._losses = self._clean = None  # the function holds the batch

    def _evaluate(self) -> Tensor:
        assert self._losses is not None
        with torch.no_grad():
            return self._losses().detach()

    def _second_closure(self, closure: Callable[..., Any]) -> Callable[[], Any]:
        if (clean := self._clean) is None:
            return closure

        def on_the_risen() -> Any:
            rise = self._evaluate() - clean
            return closure(positions=rise.topk(max(1, int(len(rise) * self.gamma))).indices)

        return on_the_risen


class SAMON(SharpnessAwareOptimizer):
    """SAM-ON (arXiv:2306.04226): perturbs the affine parameters of normalisation layers only.

    Args:
        params: as for :class:`SAM`.
        base_optimizer: a class or a factory, called with the parameters.
        rho: radius of the climb, positive.
        module: the network, which says what belongs to a normalisation layer; needed.
        adaptive: scale the climb by the weights: ``w2`` or ``eta``, see :class:`ASAM`.
        interval: two passes every so many steps, one between them.
        closure_style: ``full`` or ``official``.
        base_arguments: further arguments of ``base_optimizer``.

    Raises:
        ValueError: the module is missing or has no normalisation layer with parameters.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer = SGD,
        rho: float = 0.5,
        module: nn.Module | None = None,
        adaptive: Literal["eta", "w2"] | None = None,
        interval: int = 1,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        self._affine = normalisation_parameters(module) if module is not None else set()
        if not self._affine:
            what = "has no normalisation layer with parameters" if module is not None else "is missing"
            raise ValueError(
                f"module {what}, so SAMON cannot know what to perturb; from a configuration file use the callback "
                "SharpnessAware(perturb='norm_only')."
            )
        engine = SharpnessEngine("sam", rho, adaptive=adaptive, interval=interval)
        super().__init__(params, base_optimizer, engine, module, closure_style, **base_arguments)

    def perturbed(self, param: Tensor) -> bool:
        """Whether the parameter belongs to a normalisation layer."""
        return param in self._affine
