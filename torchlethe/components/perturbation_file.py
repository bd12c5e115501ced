"""A perturbation as a file that others can use without Lethe: numbers with their description, or a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchlethe.io import atomic_write, read_state_dict


def check_bound(v: Tensor, xi: float, p: float) -> None:
    """Refuse to hand on a perturbation outside its ball.

    Args:
        v: any shape.
        xi: radius in pixel units.
        p: the norm.

    Raises:
        ValueError: ‖v‖_p exceeds ξ.
    """
    norm = float(torch.linalg.vector_norm(v.detach().double(), p))
    if not norm <= xi:
        raise ValueError(f"the perturbation has the norm {norm:.9g}, which exceeds xi = {xi:.9g}: it was not written.")


def save_perturbation(path: str | Path, v: Tensor, xi: float, p: float, about: Mapping[str, Any]) -> Path:
    """Write a perturbation, atomically, after checking its bound.

    Args:
        path: ``.npz`` for the arrays ``v`` (1, C, H, W) float32 in pixel units of images in [0, 1], ``xi``, ``p`` and
            ``metadata`` (JSON text); ``.png`` for a picture in which −ξ is black and ξ is white, small ones enlarged.
        v: (1, C, H, W).
        xi: radius.
        p: the norm.
        about: plain values that describe how v was made.

    Returns:
        The path.

    Raises:
        ValueError: the bound is exceeded, or the suffix is another one.
    """
    path = Path(path)
    v = v.detach().cpu().float()
    check_bound(v, xi, p)
    if path.suffix == ".npz":
        text = json.dumps(dict(about), default=str)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, v=v.numpy(), xi=np.float64(xi), p=np.float64(p), metadata=np.array(text))
    elif path.suffix == ".png":
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            picture(v, xi if math.isinf(p) else float(v.abs().max())).save(file, "PNG")
    else:
        raise ValueError(f"a perturbation is written as .npz or .png, got '{path}'.")
    return path


def picture(v: Tensor, scale: float, least: int = 256) -> Image.Image:
    """A picture of v: −``scale`` black, 0 grey, ``scale`` white.

    Args:
        v: (1, C, H, W) with 1 or 3 channels (of others the first is shown).
        scale: what is shown as white.
        least: smallest side in pixels; smaller perturbations are enlarged without interpolation.
    """
    shown = v[0] if v.shape[1] in (1, 3) else v[0, :1]
    pixels = ((shown / max(scale, 1e-12) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    factor = -(-least // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def load_perturbation(path: str | Path) -> Tensor:
    """Read a perturbation without executing anything in the file.

    Args:
        path: ``.npz`` with an array ``v`` (or a single array), or a weight file with the tensor ``v``, such as the
            ``weights.safetensors`` of a run: there the version that did best is taken where there is one.

    Returns:
        (1, C, H, W) float32.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no perturbation.
    """
    path = Path(path)
    if path.suffix == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"perturbation '{path}' does not exist.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                name = "v" if "v" in arrays.files else arrays.files[0] if len(arrays.files) == 1 else None
                found = None if name is None else torch.from_numpy(arrays[name])
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"perturbation '{path}' is no readable npz file: {error}.") from None
    else:
        tensors = {name.rsplit(".", 1)[-1]: value for name, value in read_state_dict(path).items() if _own(name)}
        chosen = float(tensors.get("best_score", torch.tensor(-1.0))) >= 0 and "best" in tensors
        found = tensors.get("best" if chosen else "v")
    if found is None or found.ndim not in (3, 4) or (found.ndim == 4 and len(found) != 1):
        raise ValueError(f"perturbation '{path}' holds no array 'v' of shape (1, C, H, W).")
    return found.float().reshape(1, *found.shape[-3:])


def _own(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("v", "best", "best_score") and name.split(".")[0] in ("perturbation", name)
