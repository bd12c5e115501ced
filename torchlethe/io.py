"""Reading and writing weights: one safe door for every file that enters or leaves a run.

Nothing here executes code from a file: pickles are opened with ``weights_only=True``, and a file that needs more is
refused. Files are written under a temporary name in their own folder and moved into place, so that a killed process
leaves either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and move it into place when the block ends without an error.

    Args:
        path: the file to write; its folder is created.

    Yields:
        The path to write to. After an error it is removed and ``path`` is untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("97.3")
        >>> target.read_text()
        '97.3'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates private files; the result gets the mode any other new file would get
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file without executing anything in it.

    Args:
        path: a ``.safetensors`` file, a Lightning ``.ckpt``, or a ``.pt``, ``.pth`` or ``.bin`` file that holds a state
            dict, bare or under one of the usual keys (``state_dict``, ``model_state_dict``, ``model``, …).

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is unknown, the file is damaged, holds no tensors, or would execute code.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights '{path}' have the suffix '{path.suffix}', allowed are {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}' do not exist.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights '{path}' are no safetensors file: {error}.") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a crafted file can fail in any way the unpickler knows
        raise ValueError(
            f"weights '{path}' were refused: the file is damaged, or holds more than tensors and plain values "
            "and could execute code; where you trust it, save its state dict as .safetensors."
        ) from None
    tensors = _find_state_dict(content)
    if not tensors:
        raise ValueError(f"weights '{path}' hold no state dict: expected tensors by name, or one of {STATE_DICT_KEYS}.")
    return tensors


def _find_state_dict(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for key in STATE_DICT_KEYS:
        if isinstance(content.get(key), Mapping):
            return _find_state_dict(content[key])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_weights(network: nn.Module, path: str | Path, strict: bool = True) -> nn.Module:
    """Load a weight file into a network, whatever wrapper it was saved from.

    Prefixes that wrappers add (``network.``, ``module.``, ``model.``, ``_orig_mod.``, …) are found by comparing names
    and shapes, in both directions: a file saved without :class:`~torchlethe.models.Normalize` fits a network that has
    it and keeps the network's own statistics, and the reverse. Missing ``num_batches_tracked`` counters are accepted.

    Args:
        network: the network to fill, changed in place.
        path: see :func:`read_state_dict`.
        strict: whether every name and shape must match; otherwise what fits is loaded.

    Returns:
        The network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file was refused or does not fit; the message names missing, unexpected and misshapen keys.

    Note:
        Under DDP every rank reads the file.
    """
    found = read_state_dict(path)
    wanted = network.state_dict()
    fitted, unexpected = _align(found, wanted)
    misshapen = [name for name, value in fitted.items() if value.shape != wanted[name].shape]
    optional = _optional_names(network)
    missing = [name for name in wanted if name not in fitted and name not in optional]
    if strict and (missing or unexpected or misshapen):
        shapes = [f"{n} (file {tuple(fitted[n].shape)}, network {tuple(wanted[n].shape)})" for n in misshapen]
        parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)]
        what = "; ".join(f"{title}: {_shortened(names)}" for title, names in parts if names)
        raise ValueError(f"weights '{path}' do not fit {type(network).__name__}: {what}.")
    for name in misshapen:
        del fitted[name]
    network.load_state_dict(fitted, strict=False)
    return network


def _align(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the found tensors to the wanted names; also return the names that were left over."""
    best: tuple[int, int, dict[str, Tensor], list[str]] | None = None
    for outer in _prefixes(found):
        inner = {name.removeprefix(outer): value for name, value in found.items() if name.startswith(outer)}
        for added in _prefixes(wanted):
            fitted = {added + name: value for name, value in inner.items() if added + name in wanted}
            same_shape = sum(value.shape == wanted[name].shape for name, value in fitted.items())
            # what a checkpoint holds beside the network (metrics, teachers) is no concern of the network's
            unexpected = [name for name in inner if added + name not in wanted]
            rank = (same_shape, -len(unexpected) - len(outer) - len(added))
            if best is None or rank > best[:2]:
                best = (*rank, fitted, unexpected)
    assert best is not None  # the empty prefix is always tried
    return best[2], best[3]


def _prefixes(names: Mapping[str, Any], depth: int = 3) -> list[str]:
    """The prefixes that could be a wrapper's: those that at least half of the names share."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1][:depth]
        counts.update(".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if 2 * count >= len(names))]


def _optional_names(network: nn.Module) -> set[str]:
    """Names that a file may lack: batch counters, and buffers that the constructor already filled."""
    optional = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    for prefix, module in network.named_modules():
        if getattr(module, "constant_buffers", False):
            optional.update(f"{prefix}.{name}".lstrip(".") for name in module.state_dict())
    return optional


def _shortened(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def save_weights(network: nn.Module | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write a network's parameters and buffers as ``.safetensors``, atomically.

    Args:
        network: the network, or a state dict.
        path: the file to write, ending in ``.safetensors``.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is another one.

    Example:
        >>> import tempfile
        >>> target = save_weights(nn.Linear(2, 3), Path(tempfile.mkdtemp()) / "linear.safetensors")
        >>> tuple(load_weights(nn.Linear(2, 3), target).weight.shape)
        (3, 2)
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_weights writes .safetensors files, got '{path}'.")
    state = network.state_dict() if isinstance(network, nn.Module) else network
    # safetensors stores each tensor by itself, so views and tied weights are written out
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path
