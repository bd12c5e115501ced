"""Folders that a command line or a file names, looked at before any work."""

from __future__ import annotations

import os
from pathlib import Path

from torchlethe._cli.errors import UsageError


def check_output(key: str, folder: Path) -> None:
    """Refuse a folder of results that cannot be written to; nothing is created.

    Args:
        key: what the user knows the folder by, such as ``--output``.
        folder: the folder, which need not exist.

    Raises:
        UsageError: a file is in its place or above it, or the user may not write there.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        above = "" if place == folder.absolute() else f" below '{place}'"
        raise UsageError(f"{key} is '{folder}'{above}, which is a file; choose a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{key} is '{folder}', but '{place}' is not writable; choose another folder")
