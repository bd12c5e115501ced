"""Reading and writing weights: one safe door for every file that enters or leaves a run.

Nothing here executes code from a file: pickles are opened with ``weights_only=True``, and a file that needs more is
refused. Files are written under a temporary name in their own folder and moved into place, so that a killed process
leaves either the old file or the new one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchlethe.files import atomic_write as atomic_write
from torchlethe.files import file_hash as file_hash
from torchlethe.files import local_path as local_path

PICKLED = (".ckpt", ".pt", ".pth", ".pth.tar", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
"""What ``torch.compile`` and data-parallel wrappers put into names, at any depth."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file without executing anything in it.

    Args:
        path: a ``.safetensors`` file, a Lightning ``.ckpt``, or a ``.pt``, ``.pth``, ``.pth.tar`` or ``.bin`` file that
            holds a state dict, bare or under one of the usual keys (``state_dict``, ``model``, …).

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
        ValueError: the suffix is unknown, the file is damaged, holds no tensors, or would execute code.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
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
    except OSError as error:
        raise OSError(f"weights '{path}' cannot be read: {error.strerror or error}.") from error
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


def load_weights(network: nn.Module, path: str | Path, strict: bool = True, prefix: str | None = None) -> nn.Module:
    """Load a weight file into a network, whatever wrapper it was saved from.

    Prefixes that wrappers add (``network.``, ``model.``, …) are found by comparing names and shapes, in both
    directions: a file saved without :class:`~torchlethe.models.Normalize` fits a network that has it and keeps the
    network's own statistics, and the reverse. ``_orig_mod.`` and ``module.`` do not count anywhere in a name. Missing
    ``num_batches_tracked`` counters are accepted.

    Args:
        network: the network to fill, changed in place.
        path: see :func:`read_state_dict`.
        strict: whether every name and shape must match; otherwise what fits is loaded.
        prefix: which part of the file to load, as ``"student"`` from a file with ``student.…`` and ``teacher.…``; by
            default the part that fits best.

    Returns:
        The network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file was refused, does not fit (the message names missing, unexpected and misshapen keys; with
            ``strict=False``, nothing fits), holds several networks that fit equally well, or has no such prefix.

    Note:
        Under DDP every rank reads the file.
    """
    found = read_state_dict(path)
    wanted = network.state_dict()
    candidates = _align(found, wanted, prefix)
    if not candidates:
        parts = sorted({f"{name.split('.')[0]}." for name in found if "." in name})
        raise ValueError(f"prefix '{prefix}' is not in the weights '{path}', whose parts are {_shortened(parts)}.")
    best = max(candidates, key=lambda candidate: candidate.rank)
    misshapen = [name for name, value in best.fitted.items() if value.shape != wanted[name].shape]
    optional = _optional_names(network)
    missing = [name for name in wanted if name not in best.fitted and name not in optional]
    rivals = [other for other in candidates if other.rank[0] == best.rank[0] > 0 and not best.holds_the_same(other)]
    # where nothing fits as a whole, the keys say more than the prefixes of accidental fits
    if rivals and not (strict and (missing or misshapen)):
        names = " and ".join(f"'{one.prefix}'" for one in sorted((best, *rivals), key=lambda one: one.prefix))
        raise ValueError(
            f"weights '{path}' hold several networks that fit {type(network).__name__}, with the prefixes {names}; "
            "choose one with the argument prefix."
        )
    if strict and (missing or best.unexpected or misshapen):
        shapes = [f"{n} (file {tuple(best.fitted[n].shape)}, network {tuple(wanted[n].shape)})" for n in misshapen]
        reasons = [("missing", missing), ("unexpected", best.unexpected), ("wrong shape", shapes)]
        what = "; ".join(f"{title}: {_shortened(names)}" for title, names in reasons if names)
        raise ValueError(f"weights '{path}' do not fit {type(network).__name__}: {what}.")
    fitted = {name: value for name, value in best.fitted.items() if name not in misshapen}
    if not fitted:
        raise ValueError(
            f"weights '{path}' do not fit {type(network).__name__}: no tensor has a fitting name and shape."
        )
    network.load_state_dict(fitted, strict=False)
    return network


@dataclass(frozen=True)
class _Candidate:
    """One part of a file: its tensors under the network's names, what else is in it, and how well that fits."""

    prefix: str
    fitted: dict[str, Tensor]
    unexpected: list[str]
    rank: tuple[int, int]

    def holds_the_same(self, other: _Candidate) -> bool:
        """Whether loading the other would give the same network."""
        return self.fitted.keys() == other.fitted.keys() and all(
            value is other.fitted[name]
            or (value.dtype == other.fitted[name].dtype and torch.equal(value, other.fitted[name]))
            for name, value in self.fitted.items()
        )


def _align(found: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str | None) -> list[_Candidate]:
    """Rename the found tensors to the wanted names, in the best way for each prefix in the file."""
    plain, target = ({WRAPPERS.sub("", name): name for name in names} for names in (found, wanted))
    if len(plain) < len(found) or len(target) < len(wanted):  # the wrapper's name tells two tensors apart
        plain, target = {name: name for name in found}, {name: name for name in wanted}
    elif prefix:
        prefix = WRAPPERS.sub("", f"{prefix.rstrip('.')}.")
    shared = min(len(found), len(wanted)) / 2
    outers = _prefixes(plain, shared) if prefix is None else [f"{prefix.rstrip('.')}." if prefix else ""]
    candidates = []
    for outer in outers:
        inner = {name.removeprefix(outer): found[plain[name]] for name in plain if name.startswith(outer)}
        if not inner:
            continue
        options = []
        for added in _prefixes(target, shared):
            fitted = {target[added + name]: value for name, value in inner.items() if added + name in target}
            same_shape = sum(value.shape == wanted[name].shape for name, value in fitted.items())
            # what a checkpoint holds beside the network (metrics, losses) is no concern of the network's
            unexpected = [name for name in inner if added + name not in target]
            options.append(
                _Candidate(outer, fitted, unexpected, (same_shape, -len(unexpected) - len(outer) - len(added)))
            )
        candidates.append(max(options, key=lambda option: option.rank))
    return candidates


def _prefixes(names: Iterable[str], at_least: float, depth: int = 3) -> list[str]:
    """The prefixes that could be a wrapper's: those that enough names share."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1][:depth]
        counts.update(".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if count >= at_least)]


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
