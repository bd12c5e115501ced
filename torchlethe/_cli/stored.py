"""What a Lightning checkpoint says about the run that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchlethe._cli.errors import UsageError


def stored_hyperparameters(path: str | Path) -> dict[str, Any]:
    """The plain values that a Lightning checkpoint stores; nothing in the file is executed."""
    if not Path(path).is_file():
        raise UsageError(f"--ckpt_path: there is no file '{path}'")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped(path))
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UsageError(
            f"--ckpt_path: '{path}' was refused, as it is damaged or holds more than tensors and plain values "
            "(loading it could execute code)"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UsageError(f"--ckpt_path: '{path}' is no Lightning checkpoint; give weights with --model.weights")
    return {k: v for k, v in (content.get("hyper_parameters") or {}).items() if k not in ("_instantiator",)}


def zipped(path: str | Path) -> bool:
    """Whether a checkpoint has the zip format, which can be mapped into memory instead of read."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
