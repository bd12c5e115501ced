"""A sharpness-aware optimizer around any base optimizer, for plain PyTorch and Fabric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlethe.arguments import check_choice
from torchlethe.components import SharpnessEngine
from torchlethe.optimizers import two_pass

BaseOptimizer = Callable[[Iterable], Optimizer]
CALLBACK = "under a Lightning Trainer use the callback torchlethe.callbacks.SharpnessAware"


class SharpnessAwareOptimizer(Optimizer):
    """Two passes a step around a base optimizer; the base of ``SAM``, ``FriendlySAM`` and the others.

    ``step(closure)`` follows torch's convention: the closure zeroes the gradients, runs forward and backward and
    returns the loss. It is called twice, at w and at w + ε, and the first loss is returned; then the base optimizer
    steps from w. Learning rate schedulers, ``param_groups`` and ``state`` are those of the base optimizer;
    ``state_dict`` adds what the method remembers. A parameter group may have a radius ``rho`` of its own.

    Under a Lightning Trainer this works for 32-bit, 64-bit and bf16 precision; accumulation and fp16 loss scaling are
    refused, as a step sees one closure only, and gradient clipping touches both passes. The callback
    :class:`~torchlethe.callbacks.SharpnessAware` has none of these limits.

    Args:
        params: parameters, ``model.named_parameters()``, or parameter groups.
        base_optimizer: a class or a factory, called with the parameters.
        engine: what a method does.
        module: the network, when its running statistics are to be left alone in the second pass (recommended with
            BatchNorm).
        closure_style: ``full`` as above; ``official`` when the gradients of the first pass are there before ``step`` is
            called and the closure makes the second pass only.
        base_arguments: further arguments of ``base_optimizer``, such as ``lr``.

    Raises:
        ValueError: an argument is out of range.

    Note:
        Under DDP both passes are averaged over ranks (global perturbation) by the closure's backward.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        engine: SharpnessEngine,
        module: nn.Module | None = None,
        closure_style: Literal["full", "official"] = "full",
        **base_arguments: Any,
    ) -> None:
        check_choice(("full", "official"), closure_style=closure_style)
        self.base = base_optimizer(list(params), **base_arguments)
        if isinstance(self.base, SharpnessAwareOptimizer | torch.optim.LBFGS):
            raise ValueError(f"base_optimizer makes a {type(self.base).__name__}, which runs closures of its own.")
        super().__init__(self.base.param_groups, self.base.defaults)
        self.engine, self.module, self.closure_style = engine, module, closure_style
        self._zeroed = False
        self._first: two_pass.FirstPass | None = None
        self._share()

    def _share(self) -> None:
        """Be one optimizer with the base: its groups (which schedulers change) and its state."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def perturbed(self, param: Tensor) -> bool:
        """Whether the climb may move a parameter."""
        return True

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the method.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss.

        Returns:
            The loss at w; with ``closure_style="official"`` the loss at w + ε.

        Raises:
            RuntimeError: there is no closure, it does not zero the gradients, or a gradient is sparse.
            NonFiniteGradientError: the first gradient is NaN or infinite; the weights are as before. On a GPU, where a
                look at every step would cost time, :meth:`state_dict` raises it.
        """
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step needs a closure that zeroes the gradients, runs forward and backward and "
                f"returns the loss; with fp16 loss scaling there is none: {CALLBACK}."
            )
        closure = torch.enable_grad()(closure)
        official, engine = self.closure_style == "official", self.engine
        loss = None if official else self._first_pass(closure)
        if engine.two_passes(engine.steps):
            second = two_pass.second_pass(
                self.param_groups, engine, engine.steps, self.perturbed, self._second_closure(closure), self.module
            )
            loss = second if official else loss
        else:
            two_pass.one_pass(engine, self.param_groups)
        self._base_step()
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """Climb with the gradients that are there, as davda54/sam and nblt/F-SAM do it.

        Args:
            zero_grad: clear the gradients afterwards.
        """
        self._first = two_pass.gradients(self.param_groups, self.engine, self.perturbed)
        two_pass.climb(self.param_groups, self.engine, self.engine.steps, self.perturbed, self._first)
        if zero_grad:
            two_pass.clear(self.param_groups)

    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to w and step with the gradients that are there.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: :meth:`first_step` was not called before.
        """
        first, self._first = self._first, None
        if first is None:
            raise RuntimeError("second_step was called without first_step.")
        self.engine.restore()
        two_pass.combine(self.engine, first)
        self._base_step()
        if zero_grad:
            two_pass.clear(self.param_groups)

    def _second_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        return closure

    def _first_pass(self, closure: Callable[[], Any]) -> Any:
        """Run the closure at w, and make sure that it does not add to older gradients."""
        older = next((p for p in two_pass.all_params(self.param_groups) if p.grad is not None), None)
        if older is not None and older.grad is not None:
            older.grad = older.grad.clone()  # a new object: it is still there afterwards if nothing cleared it
        before, self._zeroed = None if older is None else older.grad, False
        loss = closure()
        if older is not None and older.grad is before and not self._zeroed:
            raise RuntimeError(
                f"the closure of {type(self).__name__}.step does not zero the gradients (optimizer.zero_grad()), so "
                f"they would add up; for gradient accumulation {CALLBACK}."
            )
        return loss

    def _base_step(self) -> None:
        self.base.step()
        self.engine.after_step(self.param_groups)
        self.engine.steps += 1

    # --- what an optimizer has besides ----------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; see :meth:`torch.optim.Optimizer.zero_grad`."""
        self._zeroed = True
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer; see :meth:`torch.optim.Optimizer.add_param_group`."""
        if "engine" not in self.__dict__:  # torch's own constructor lists the groups that the base has already
            super().add_param_group(param_group)
        else:
            self.base.add_param_group(param_group)
            self._share()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and in it what the method remembers and the number of steps.

        No copy of the weights is in it, so it must not be taken between :meth:`first_step` and :meth:`second_step`.

        Raises:
            NonFiniteGradientError: a first gradient was NaN or infinite since the last call.
        """
        places = {param: str(i) for i, param in enumerate(two_pass.all_params(self.param_groups))}
        return {**self.base.state_dict(), "sharpness": self.engine.state_dict(places)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore base optimizer, memory and number of steps.

        Raises:
            ValueError: the state belongs to another method, or to a plain optimizer.
        """
        if "sharpness" not in state_dict:
            raise ValueError(f"the state is not one of {type(self).__name__}: it has no 'sharpness'.")
        places = {param: str(i) for i, param in enumerate(two_pass.all_params(self.param_groups))}
        self.engine.load_state_dict(state_dict["sharpness"], places)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "sharpness"})
        self._share()
