"""What leaves a run of a universal attack: v as a file, and checkpoints without the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torchlethe.components.originals import weights_hash
from torchlethe.components.perturbation_file import save_perturbation
from torchlethe.components.split_network import SplitNetwork
from torchlethe.components.universal_noise import Init
from torchlethe.lightning_modules.attacks.judging import JudgedPerturbation


class StoredPerturbation(JudgedPerturbation):
    """The part of :class:`UniversalPerturbation` that writes and reads v; not for use by itself."""

    xi: float
    p: float
    clamp: bool
    init: Init
    seed: int
    feature_layer: str | None
    _restored: dict[str, Any] | None
    _split: SplitNetwork | None
    _hash: str | None

    def about(self) -> dict[str, Any]:
        """What one needs to know about v: method, ball, network, score; plain values."""
        score = float(self.noise.best_score)
        return {
            "method": type(self).__name__,
            "xi": self.xi,
            "p": str(self.p),
            "clamp": self.clamp,
            "init": self.init,
            "seed": self.seed,
            "target": self.target,
            "shape": list(self.noise.v.shape[1:]),
            "pixels": "added to images in [0, 1], before normalisation",
            "network": type(self.network).__name__,
            "network_sha256": self.network_hash(),
            "feature_layer": self._split.feature_layer if self._split is not None else self.feature_layer,
            "selection_score": score if score >= 0 else None,
        }

    def export(self, path: str | Path) -> Path:
        """Write v as ``.npz`` (with its description) or ``.png``, after checking its bound.

        Args:
            path: the file.

        Raises:
            ValueError: v exceeds ξ, or the suffix is another one.
        """
        return save_perturbation(path, self.noise.chosen, self.xi, self.p, self.about())

    def network_hash(self) -> str:
        """SHA-256 of the network's weights, computed once."""
        if self._hash is None:
            self._hash = weights_hash(self.network)
        return self._hash

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the attack's state and the hash of the network, whose weights are left out."""
        shape = list(self.noise.v.shape[1:])
        state = {"state": self.attack.state_dict(), "network_hash": self.network_hash(), "shape": shape}
        checkpoint["attack"] = {**state, "ball": self._ball()}

    def _ball(self) -> dict[str, Any]:
        """What a v is made for, beside the network: a checkpoint of another one is refused."""
        kind = {"method": type(self).__name__, "target": self.target}
        return {**kind, "xi": float(self.xi), "p": float(self.p), "clamp": self.clamp}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make v before it is filled; refuse a checkpoint for another network, ball or target."""
        state = checkpoint.get("attack")
        if state is None or "perturbation.v" not in checkpoint["state_dict"]:
            raise ValueError(f"the checkpoint holds no perturbation, so it is none of a {type(self).__name__}.")
        if state["network_hash"] != self.network_hash():
            raise ValueError(
                f"the checkpoint was made for a network with other weights ({state['network_hash'][:12]}…) than this "
                f"one ({self.network_hash()[:12]}…): give the same with the argument weights."
            )
        self.build(state["shape"])
        for name, value in state.get("ball", {}).items():
            if value != (now := self._ball()[name]):
                raise ValueError(f"the checkpoint was made with {name}={value}, but this run has {name}={now}.")
        self._restored = state["state"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what a checkpoint holds; the network keeps its own weights."""
        own = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return super().load_state_dict({**state_dict, **own}, strict, assign)


def without_network(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Leave the network out of a state dict: it is somebody else's, and large."""
    for name in [name for name in state if name.startswith(f"{prefix}network.")]:
        del state[name]
