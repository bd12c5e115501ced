"""Weight saliency: which weights a forgetting step may move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlethe.arguments import check_at_least, check_within
from torchlethe.functional.forgetting import saliency_ratio


class SaliencyMask:
    """A 0/1 mask over a network's weights, applied to gradients.

    Args:
        masks: a boolean (or 0/1) tensor for each parameter, by the parameter's name.

    Example:
        >>> mask = SaliencyMask.from_ratio({"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}, gamma=1.0)
        >>> mask.masks["w"], mask.kept_fraction()
        (tensor([1., 0.]), 0.5)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        # stored as floats, since a foreach product needs both sides in one dtype
        self.masks = {name: m if m.is_floating_point() else m.float() for name, m in masks.items()}

    @classmethod
    def from_ratio(
        cls, forget_fisher: Mapping[str, Tensor], remain_fisher: Mapping[str, Tensor], gamma: float = 1.0
    ) -> SaliencyMask:
        """Keep the weights whose Fisher information on the forget set is at least ``gamma`` times that on the rest.

        Args:
            forget_fisher: diagonal Fisher information on the forget set, by parameter name.
            remain_fisher: the same on the remaining data.
            gamma: threshold, at least 0; 0 keeps every weight, infinity none.

        Returns:
            The mask. Source: SFRon, eq. for the weight saliency as coded.

        Raises:
            ValueError: ``gamma`` is negative.
        """
        check_at_least(0, gamma=gamma)
        return cls(
            {
                name: (saliency_ratio(value, remain_fisher[name]) >= gamma).to(value.dtype)
                for name, value in forget_fisher.items()
            }
        )

    @classmethod
    def from_top_fraction(cls, scores: Mapping[str, Tensor], fraction: float) -> SaliencyMask:
        """Keep the given fraction of all weights, those with the highest scores; ties are broken by position.

        Args:
            scores: a score for each weight, by parameter name.
            fraction: share to keep, in [0, 1], rounded down to a whole number of weights.

        Returns:
            The mask.

        Raises:
            ValueError: the fraction is out of range.
        """
        check_within(0, 1, fraction=fraction)
        flat = torch.cat([value.flatten() for value in scores.values()])
        kept = torch.zeros_like(flat)
        kept[flat.argsort(descending=True, stable=True)[: int(fraction * flat.numel())]] = 1
        parts = kept.split([value.numel() for value in scores.values()])
        return cls({name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)})

    def select(self, names: Iterable[str]) -> list[Tensor]:
        """The masks of the named parameters, in that order, for foreach operations."""
        return [self.masks[name] for name in names]

    def like(self, parameters: Mapping[str, Tensor]) -> SaliencyMask:
        """The mask in dtype, memory layout and on the device of the parameters that it is for.

        Raises:
            ValueError: a parameter has no mask, or one of another shape.
        """
        for name, p in parameters.items():
            if name not in self.masks or self.masks[name].shape != p.shape:
                raise ValueError(f"the mask has no entry for the parameter '{name}' of shape {tuple(p.shape)}.")
        # in another layout each product with a gradient would go element by element
        with torch.no_grad():
            return SaliencyMask({name: torch.empty_like(p).copy_(self.masks[name]) for name, p in parameters.items()})

    @contextmanager
    def held(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> Iterator[None]:
        """Put masked weights, and their optimizer state, back as they were when the block ends.

        Masking a gradient alone does not hold a weight: weight decay and momentum still move it.

        Args:
            parameters: the parameters that the optimizer steps inside the block, by name.
            optimizer: their optimizer.

        Yields:
            Nothing; step the optimizer inside.
        """
        before = {name: self._moving(p, optimizer) for name, p in parameters.items()}
        saved = {name: {key: t.detach().clone() for key, t in tensors.items()} for name, tensors in before.items()}
        yield
        with torch.no_grad():
            for name, p in parameters.items():
                free = self.masks[name].bool()
                for key, tensor in self._moving(p, optimizer).items():
                    # a state that the first step created counts as zero before it
                    old = saved[name].get(key, torch.zeros_like(tensor))
                    tensor.copy_(torch.where(free, tensor, old))

    @staticmethod
    def _moving(parameter: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
        state = optimizer.state.get(parameter, {})
        moving = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape and v.dim()}
        return {"": parameter.detach(), **moving}

    def kept_fraction(self) -> float:
        """Share of the weights that may move, in [0, 1]."""
        kept = torch.stack([mask.sum(dtype=torch.float64) for mask in self.masks.values()]).sum()
        return kept.item() / sum(mask.numel() for mask in self.masks.values())

    def kept_fractions(self) -> dict[str, float]:
        """Share of the weights that may move, by parameter name."""
        shares = torch.stack([mask.mean(dtype=torch.float64) for mask in self.masks.values()]).tolist()
        return dict(zip(self.masks, shares, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """One bit for each weight, with the shapes."""
        bits = torch.cat([mask.flatten() for mask in self.masks.values()]).bool().cpu()
        padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        return {
            "bits": (padded * powers).sum(1, dtype=torch.uint8),
            "shapes": {name: tuple(mask.shape) for name, mask in self.masks.items()},
            "dtype": str(next(iter(self.masks.values())).dtype).removeprefix("torch."),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> SaliencyMask:
        """Rebuild a mask from :meth:`state_dict`, on a device."""
        dtype = getattr(torch, state["dtype"])
        bits = (state["bits"].to(device).unsqueeze(1) >> torch.arange(8, device=device) & 1).flatten()
        sizes = [torch.Size(shape).numel() for shape in state["shapes"].values()]
        parts = bits[: sum(sizes)].to(dtype).split(sizes)
        return cls({name: part.view(shape) for (name, shape), part in zip(state["shapes"].items(), parts, strict=True)})
