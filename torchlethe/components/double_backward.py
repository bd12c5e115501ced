"""Exact short cuts for gradients of input gradients: BatchNorm folded away, no passes over zeros, fast weight terms.

Differentiating ‖∇ₓf‖² with respect to the weights costs autograd more than it has to: BatchNorm has a long second
derivative although in eval mode it is a scaling; the second derivative of ReLU and of pooling is zero almost
everywhere, yet autograd carries these zeros back through the whole network; and the weight term of a convolution's
second derivative is computed as a convolution with a kernel of the size of the image. Each is replaced by what it
equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from torchlethe.functional.mean_loss import differentiable_twice

_convolution_backward = torch.ops.aten.convolution_backward
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Convolution(torch.autograd.Function):
    """A convolution whose input gradient is :class:`_InputGradient`; ``settings`` as in ``convolution_backward``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, run: Callable[..., Tensor], settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = settings, bias is not None
        return run(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # the graph of an input gradient is being made: nobody asks for the weights' gradient now
            return _InputGradient.apply(gradient, weight, x, ctx.settings), None, None, None, None
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return *_backward(gradient, x, weight, ctx.settings, wanted), None, None


class _InputGradient(torch.autograd.Function):
    """The input gradient of a convolution, linear in both of its arguments; ``x`` lends its shape."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.settings = settings
        return _backward(gradient, x, weight, settings, (True, False, False))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, direction: Tensor) -> Any:
        gradient, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        along = weight_term = None
        if ctx.needs_input_grad[0]:
            zeros = [0] * len(stride)
            along = torch.convolution(direction, weight, None, stride, padding, dilation, False, zeros, groups)
        if ctx.needs_input_grad[1]:
            weight_term = _backward(gradient, direction, weight, ctx.settings, (False, True, False))[1]
        return along, weight_term, None, None


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...], wanted: tuple[bool, ...]) -> Any:
    stride, padding, dilation, groups = settings
    bias = [weight.shape[0]] if wanted[2] else None
    zeros = [0] * len(stride)
    return _convolution_backward(
        gradient, x, weight, bias, stride, padding, dilation, False, zeros, groups, list(wanted)
    )


class _Relu(torch.autograd.Function):
    """ReLU whose second derivative is absent in place of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y.detach(), 0)


class _MaxPool(torch.autograd.Function):
    """2-D max pooling whose second derivative is absent in place of zero; ``settings`` as in ``max_pool2d``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *settings)
        ctx.save_for_backward(x, places)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, places = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(gradient, x.detach(), *ctx.settings, places), None


class _PiecewiseLinear(TorchFunctionMode):
    """Inside it, ReLU and max pooling are the ones above."""

    relus = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.relus:
            return _Relu.apply(args[0] if args else kwargs["input"])
        if func is torch.max_pool2d and (settings := _pool_settings(*args[1:], **(kwargs or {}))):
            return _MaxPool.apply(args[0], settings)
        return func(*args, **(kwargs or {}))


def _pool_settings(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    **rest: Any,
) -> tuple[Any, ...] | None:
    if return_indices or rest:
        return None
    sizes = [kernel_size, stride if stride is not None and stride != [] else kernel_size, padding, dilation]
    return *([size, size] if isinstance(size, int) else list(size) for size in sizes), ceil_mode


class DoubleBackward:
    """Lets a network's input gradients be differentiated fast; the values are those of plain autograd.

    What can be replaced is found by one pass over a few images and checked by comparing the logits with other BatchNorm
    statistics in both forms: what does not agree, such as a convolution whose output somebody else reads too, stays as
    it is. The network itself is not changed outside of :meth:`active`.

    Args:
        network: the network, on its device.
        image: (B, …) a few of its inputs, at least one.

    Attributes:
        folded: pairs of names, a convolution or linear layer and the BatchNorm that is folded into it.
        piecewise: whether ReLU and max pooling are replaced.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> DoubleBackward(network.eval(), torch.rand(2, 1, 4, 4)).folded
        [('0', '1')]
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        with differentiable_twice(network), torch.no_grad():
            self._find(network, image)
        names = {part: name for name, part in network.named_modules()}
        self.folded = [(names[layer], names[norm]) for layer, norm in self._pairs]

    def _find(self, network: nn.Module, image: Tensor) -> None:
        self._pairs = _followed_by_norm(network, image)
        alone = [part for part in network.modules() if type(part) in _CONVOLUTIONS and _replaceable(part)]
        self._convolutions = [part for part in alone if part not in {layer for layer, _ in self._pairs}]
        self.piecewise = True
        state = _other_statistics(network)
        expected = functional_call(network, state, (image,))
        if self._agrees(network, state, image, expected):
            return
        pairs, self._pairs = self._pairs, []
        self.piecewise = self._agrees(network, state, image, expected)
        for pair in pairs:
            self._pairs.append(pair)
            if not self._agrees(network, state, image, expected):
                self._pairs.pop()
                self._convolutions += [pair[0]] if type(pair[0]) in _CONVOLUTIONS else []

    def _agrees(self, network: nn.Module, state: dict[str, Tensor], image: Tensor, expected: Tensor) -> bool:
        with self.active():
            found = functional_call(network, state, (image,))
        return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the network (in eval mode) runs in the replaced form; afterwards it is as it was."""
        own: list[nn.Module] = []
        try:
            for layer in self._convolutions:
                own.append(layer)
                layer.forward = _forward(layer, None)
            for layer, norm in self._pairs:
                own += [layer, norm]
                layer.forward = _forward(layer, norm)
                norm.forward = _unchanged
            if self.piecewise:
                with _PiecewiseLinear():
                    yield
            else:
                yield
        finally:
            for part in own:
                part.__dict__.pop("forward", None)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _forward(layer: Any, norm: Any) -> Callable[[Tensor], Tensor]:
    """The forward of a layer with the BatchNorm that follows it, or of a convolution alone."""
    run = _CONVOLUTIONS.get(type(layer))

    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if norm is not None:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        if run is None:
            return F.linear(x, weight, bias)
        settings = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        if x.ndim != weight.ndim or not torch.is_grad_enabled():
            return run(x, weight, bias, *settings)
        return _Convolution.apply(x, weight, bias, run, settings)

    return forward


def _replaceable(layer: Any) -> bool:
    """Whether a layer runs the forward of its class, on its own weights and with zero padding."""
    if "forward" in layer.__dict__:
        return False
    plain = type(layer) is nn.Linear or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
    return plain and not layer._forward_hooks and not layer._forward_pre_hooks


def _followed_by_norm(network: nn.Module, image: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """The layers whose very output a BatchNorm with running statistics reads, each called once in a pass."""
    written: dict[int, tuple[nn.Module, Tensor]] = {}
    found: list[tuple[nn.Module, nn.Module]] = []
    calls: dict[nn.Module, int] = {}

    def note(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[part] = calls.get(part, 0) + 1
        if isinstance(part, _BatchNorm):
            layer, tensor = written.get(id(inputs[0]), (None, None))
            if layer is not None and tensor is inputs[0]:
                found.append((layer, part))
        elif isinstance(output, Tensor):
            # holding the tensor keeps its id from being given to another
            written[id(output)] = (part, output)

    layers = [part for part in network.modules() if type(part) in (*_CONVOLUTIONS, nn.Linear) and _replaceable(part)]
    norms = [p for p in network.modules() if isinstance(p, _BatchNorm) and p.running_var is not None]
    norms = [p for p in norms if not p._forward_hooks and not p._forward_pre_hooks and "forward" not in p.__dict__]
    handles = [part.register_forward_hook(note) for part in (*layers, *norms)]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [(layer, norm) for layer, norm in found if calls[layer] == 1 and calls[norm] == 1]


def _other_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers with altered BatchNorm, so that no scale is 1 and no shift 0 by chance."""
    state: dict[str, Tensor] = {}
    for name, part in network.named_modules():
        if not isinstance(part, _BatchNorm) or part.running_var is None:
            continue
        values: dict[str, Tensor | None] = {"weight": part.weight, "bias": part.bias}
        values |= {"running_mean": part.running_mean, "running_var": part.running_var}
        for key, value in values.items():
            if value is not None:
                wave = torch.linspace(0.5, 1.5, value.numel(), device=value.device, dtype=value.dtype)
                moved = value * wave + (0.1 * wave if key in ("bias", "running_mean") else 0.0)
                state[f"{name}.{key}" if name else key] = moved
    return state
