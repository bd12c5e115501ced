"""Random signs: what a perturbation of this size does without any design."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import UniversalNoise
from torchlethe.updates.attacks.base import UniversalAttack


class RandomNoise(UniversalAttack):
    """Leave v as it was drawn: the reference that every attack has to beat."""

    learns_by_loss: ClassVar[bool] = False

    def step(self, network: SplitNetwork, noise: UniversalNoise, batch: Mapping[str, Any], k: int) -> dict[str, Any]:
        """Nothing."""
        return {}
