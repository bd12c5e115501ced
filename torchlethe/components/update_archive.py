"""Weight changes of single training steps on disk, for amnesiac unlearning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchlethe.io import atomic_write

SAMPLES = "__samples__"
SUMMARY = "update_log.json"


class UpdateArchive:
    """A folder with one ``step_….safetensors`` for each logged step, and ``update_log.json`` once training is done.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write(self, step: int, samples: Tensor, changes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Write what a step changed.

        Args:
            step: its number; a step written before is replaced.
            samples: indices of the candidates in its batch.
            changes: the change of each parameter, by name.
            dtype: in which the changes are stored.
        """
        tensors = {name: change.to("cpu", dtype).contiguous() for name, change in changes.items()}
        with atomic_write(self.folder / f"step_{step:08d}.safetensors") as temporary:
            save_file({**tensors, SAMPLES: samples.cpu()}, temporary)

    def steps(self) -> list[Path]:
        """The files of the logged steps, in order."""
        return sorted(self.folder.glob("step_*.safetensors"))

    def drop_from(self, step: int) -> None:
        """Delete what was written for this step and later ones, as a resumed run writes it again."""
        for path in self.steps():
            if int(path.stem.removeprefix("step_")) >= step:
                path.unlink()

    def steps_with(self, samples: Tensor) -> list[Path]:
        """The files of the steps whose batches held one of the samples (M,)."""
        found = []
        for path in self.steps():
            with safe_open(path, "pt") as file:
                if torch.isin(file.get_tensor(SAMPLES), samples).any():
                    found.append(path)
        return found

    def read(self, path: Path) -> dict[str, Tensor]:
        """The changes in a file of :meth:`steps`, by parameter name."""
        return {name: tensor for name, tensor in load_file(path).items() if name != SAMPLES}

    def finish(self, candidates: Sequence[int], final: str) -> None:
        """Say that the log is whole: which samples it covers, and the hash of the weights it ends in."""
        content = {"candidates": list(candidates), "final": final, "steps": len(self.steps())}
        with atomic_write(self.folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(content) + "\n")

    def summary(self) -> dict[str, Any]:
        """What :meth:`finish` wrote.

        Raises:
            ValueError: there is no log, or its training did not come to its end, or files of it are gone.
        """
        path = self.folder / SUMMARY
        if not path.is_file():
            state = "is not finished: train to the end first" if self.steps() else "holds no update log"
            raise ValueError(f"log '{self.folder}' {state}.")
        content = json.loads(path.read_text())
        if content["steps"] != len(self.steps()):
            raise ValueError(f"log '{self.folder}' has {len(self.steps())} of {content['steps']} steps.")
        return content
