"""The folder that :class:`torchlethe.callbacks.CheckpointEnsemble` writes: weights of one run, and a list of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchlethe.functional.self_ensemble import equidistant
from torchlethe.io import atomic_write, file_hash, load_weights, read_state_dict

LIST = "ensemble.json"


@dataclass(frozen=True)
class Checkpoint:
    """One line of the list.

    Attributes:
        file: name of the weights' file in the folder.
        epoch: the epoch that had just ended, from 0.
        step: the Trainer's ``global_step`` then.
        sha256: hash of the file.
        metrics: what was logged by then.
    """

    file: str
    epoch: int
    step: int
    sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def write_list(folder: Path, checkpoints: Sequence[Checkpoint], **about: Any) -> None:
    """Write the list of a folder, atomically.

    Args:
        folder: the folder.
        checkpoints: in the order of training.
        **about: plain values that hold for all.
    """
    content = {"format": 1, **about, "checkpoints": [asdict(checkpoint) for checkpoint in checkpoints]}
    with atomic_write(folder / LIST) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


class CheckpointFolder:
    """Read an ensemble's folder.

    Args:
        folder: the folder with ``ensemble.json``.

    Attributes:
        checkpoints: what the folder holds, oldest first.
        about: the other entries of the list: ``submodule``, ``dtype``, ``complete``, ``num_classes``.

    Raises:
        FileNotFoundError: there is no list in it.
        ValueError: the list is damaged or empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / LIST
        if not path.is_file():
            raise FileNotFoundError(
                f"ensemble '{folder}' has no {LIST}: give the folder that a CheckpointEnsemble callback wrote."
            )
        try:
            content = json.loads(path.read_text())
            self.checkpoints = [Checkpoint(**entry) for entry in content.pop("checkpoints")]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"ensemble '{path}' is damaged: it is no list of checkpoints.") from None
        if not self.checkpoints:
            raise ValueError(f"ensemble '{path}' lists no checkpoints.")
        self.about: dict[str, Any] = content

    def __len__(self) -> int:
        return len(self.checkpoints)

    def select(self, count: int) -> list[Checkpoint]:
        """Choose checkpoints at equal distances that end with the last.

        Args:
            count: N.

        Raises:
            ValueError: the folder holds fewer.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"checkpoints is {count}, the ensemble '{self.folder}' holds {len(self)}.")
        return [self.checkpoints[position] for position in equidistant(len(self), count)]

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's weights are."""
        return self.folder / checkpoint.file

    def verify(self, checkpoint: Checkpoint) -> None:
        """Compare a file with the list.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: its content is another one.
        """
        path = self.path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"ensemble: '{path}' does not exist, though {LIST} lists it.")
        if file_hash(path) != checkpoint.sha256:
            raise ValueError(f"ensemble: '{path}' is not the file that {LIST} lists, its sha256 differs.")

    def read(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """A checkpoint's tensors by name, on the CPU."""
        return read_state_dict(self.path(checkpoint))

    def load(self, checkpoint: Checkpoint, network: nn.Module) -> nn.Module:
        """Fill a network with a checkpoint's weights; see :func:`torchlethe.io.load_weights`."""
        return load_weights(network, self.path(checkpoint))
