"""Files, without PyTorch: written in one step, told apart by their content.

A file is written under a temporary name in its own folder and moved into place, so that a killed process leaves either
the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STALE_SECONDS = 3600.0


def local_path(path: str | Path) -> Path:
    """A path on this machine, also when it is given as a ``file:///…`` URL.

    Example:
        >>> local_path("file:///data/last.ckpt").as_posix()
        '/data/last.ckpt'
    """
    # Path and Lightning turn file:///data into file:/data
    return Path(re.sub(r"^file:/+", "/", str(path)))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and move it into place when the block ends without an error.

    What a process that was killed an hour ago or earlier left behind of the same file is removed.

    Args:
        path: the file to write; its folder is created.

    Yields:
        The path to write to. After an error it is removed and ``path`` is untouched.

    Raises:
        IsADirectoryError: ``path`` is a folder.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("97.3")
        >>> target.read_text()
        '97.3'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder, no file can be written in its place.")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
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


def remove_stale(path: Path) -> None:
    """Remove the temporary files and folders of a path that a process left when it was killed an hour ago or earlier.

    Args:
        path: what was to be written; its folder exists.
    """
    # mkstemp fills in eight characters without a dot, so the file 'a' does not claim those of 'a.b'; a younger file
    # may belong to a process that is writing right now
    name = re.compile(re.escape(f".{path.name}.") + r"[^.]{8}\.tmp")
    for found in path.parent.iterdir():
        if name.fullmatch(found.name):
            with contextlib.suppress(OSError):  # another process may remove it at the same time
                if time.time() - found.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(found) if found.is_dir() else found.unlink()


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(content: Mapping[str, Any]) -> str:
    """JSON for people: indented, each list of numbers on a line.

    Example:
        >>> print(to_json({"a": 1.5, "b": [1, None]}), end="")
        {
          "a": 1.5,
          "b": [1, null]
        }
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    numbers = re.compile(r"\[\s+((?:[-+\d.eE]+|null)(?:,\s+(?:[-+\d.eE]+|null))*)\s+\]")
    return numbers.sub(lambda found: f"[{re.sub(chr(92) + 's+', ' ', found[1])}]", text) + "\n"
