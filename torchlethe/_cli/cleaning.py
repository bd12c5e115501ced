"""What a run must not leave behind in its process."""

from __future__ import annotations

import atexit

import torch
from lightning.fabric.utilities.data import get_all_subclasses
from torch.utils.data import BatchSampler, DataLoader


@atexit.register
def leave_process_group() -> None:
    """Leave the process group, if this process is in one, before the interpreter ends.

    Lightning does so for NCCL only. A process that ends in a group of gloo is sometimes aborted at its very end, which
    turns a finished run into a failed one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def unpatch_loaders() -> None:
    """Give the loader classes their own methods back.

    While Lightning asks for loaders it replaces methods of these classes, and does not put them back when a hook
    raises: the next run in the process (the next stage of a study) would then stumble over a loader made with
    positional arguments.
    """
    for base in (DataLoader, BatchSampler):
        for kind in get_all_subclasses(base) | {base}:
            for method in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{method}" in kind.__dict__:
                    setattr(kind, method, kind.__dict__[f"__old{method}"])
                    delattr(kind, f"__old{method}")
