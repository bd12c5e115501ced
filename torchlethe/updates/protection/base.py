"""What a protection is: one preparation for the whole set, then images in, protected images out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchlethe.components.originals import tensors_hash
from torchlethe.updates.protection.snapshots import Snapshots

Batches = Iterable[Mapping[str, Tensor]]
"""Batches that can be gone through again and again, in a fixed order, without augmentation: dicts of ``image``
(B, C, H, W) uint8, ``label`` (B,) int64 and ``index`` (B,) int64, on the device, without padding."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


class Protection(ABC):
    """Turns clean images into protected ones: same labels, a perturbation small enough to overlook.

    A plain loop::

        protection.prepare(batches, device=device)
        for batch in batches:
            protected = protection.protect(batch["image"], batch["label"], batch["index"])

    What :meth:`protect` gives for an image depends on the settings, the seed, the image, its label and index, and on
    the outcome of :meth:`prepare`; never on the other images of the batch. So any batch size and any division among
    ranks gives the same protected set (as far as the device computes a network's output independently of the batch).

    Attributes:
        radius: largest change of a pixel value, in units of 1/255, for methods with an L∞ bound; None for others,
            which say theirs in :meth:`bound`.
        networks: the networks that the method reads, by name; a Lightning module registers them, so that they move to
            the device with it. They are used in eval mode and come out as they went in.
        shards: whether :meth:`prepare` may be given a part of the data on each rank, and a sum over ranks; otherwise
            it is given all of the data on every rank, and every rank computes the same.
        prepares: whether :meth:`prepare` has an outcome worth keeping.
        prepared: whether :meth:`prepare` has run, or its outcome was restored.
        notes: what the last call of :meth:`protect` has to say about each image: (B,) floating tensors by name.
        snapshots: where a long :meth:`prepare` starts and leaves its states; nowhere, unless the caller sets it.
    """

    radius: int | None = None
    shards: bool = False
    prepares: bool = True
    prepared: bool = False

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {}
        self.notes: dict[str, Tensor] = {}
        self.snapshots = Snapshots()

    def prepare(self, data: Batches, *, device: torch.device | str, reduce: Reduce | None = None) -> dict[str, float]:
        """Do what is the same for all images: class means, patterns of the classes, noise trained jointly.

        Args:
            data: all images that the preparation sees; see :data:`Batches`.
            device: where to compute; the images are there already.
            reduce: given when ``data`` is this rank's part (:attr:`shards`): sums a tensor over all ranks.

        Returns:
            Numbers worth logging.
        """
        self.prepared = True
        return {}

    @abstractmethod
    def protect(self, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Protect images.

        Works inside ``torch.no_grad`` and ``torch.inference_mode`` too, and leaves torch's random state alone.

        Args:
            image: (B, C, H, W) uint8.
            label: (B,) int64, the classes.
            index: (B,) int64, the positions in the data set; randomness depends on them and the seed alone.

        Returns:
            (B, C, H, W) uint8 on the same device.
        """

    def bound(self) -> dict[str, Any]:
        """What no protected image exceeds, for manifests and their verification.

        Returns:
            ``norm``: ``"inf"`` (largest change of a value), ``"2"`` (Euclidean norm of an image's change, before
            rounding to bytes), ``"rms"`` (root mean square of an image's change, before rounding) or ``"pixels"``
            (number of changed pixels); ``value``: in units of 1/255 for ``"inf"`` and ``"rms"``, of the [0, 1] range
            for ``"2"``, a count for ``"pixels"``. It can be asked before :meth:`prepare`.
        """
        if self.radius is None:
            raise NotImplementedError(f"{type(self).__name__} has no radius, so it must say its bound.")
        return {"norm": "inf", "value": self.radius}

    def describe(self) -> dict[str, Any]:
        """The method and all its settings as plain values (they go to JSON): for manifests and cached preparations."""
        return {"method": type(self).__name__, "radius": self.radius}

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with whatever a protected image depends on beside the data.

        By default all settings and the networks' weights. A folder of protected images goes by it.
        """
        described = json.dumps(self.describe(), sort_keys=True)
        weights = [f"{name}:{tensors_hash(network.state_dict())}" for name, network in sorted(self.networks.items())]
        return hashlib.sha256("\n".join([described, *weights]).encode()).hexdigest()

    def preparation_fingerprint(self) -> str:
        """64 hexadecimal digits that change with what the outcome of :meth:`prepare` depends on beside the data.

        By default :meth:`fingerprint`; a method whose preparation does not read all settings names fewer here.
        """
        return self.fingerprint()

    def to(self, device: torch.device | str) -> Self:
        """Move networks, and what was prepared, to a device."""
        for network in self.networks.values():
            network.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The outcome of :meth:`prepare`, tensors and plain values, so that it need not be repeated."""
        return {"prepared": self.prepared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; tensors may lie on another device, :meth:`to` follows."""
        self.prepared = state["prepared"]
