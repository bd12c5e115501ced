"""What files hold: configuration, weights, and local data with a cheap mark of its content.

Which data a stage reads is taken from its configuration, also from the full one with all defaults that a run leaves
behind; so data is recorded with a result, not part of its key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

LARGE = 32 * 2**20  # bytes: a larger file counts by size and time of change, as reading it takes a while
MANY = 64  # files: a folder with more counts by names, sizes and times of change
CROWD = 20_000  # files: of a folder with more only names count
NOT_READ = re.compile(r"cache|default_root_dir|dirpath|save_dir|output", re.IGNORECASE)
# these keep their files among those of other data sets in one folder
SHARED_ROOTS = {
    "CIFAR10DataModule": ("cifar-10-batches-py", "*.parquet"),
    "CIFAR100DataModule": ("cifar-100-python",),
    "SVHNDataModule": ("*_32x32.mat",),
}


def file_content(path: Path) -> str:
    """The SHA-256 of a file's content; ``missing`` where there is none."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return _file_hash(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_yaml(path: Path) -> Any:
    """The content of a YAML file, read once as long as it does not change."""
    found = path.stat()
    return _yaml(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _yaml(path: str, size: int, changed: int, inode: int) -> Any:
    return yaml.safe_load(Path(path).read_bytes())


def config_content(path: Path, seen: frozenset[Path] = frozenset()) -> str:
    """The content of a configuration file and of the YAML files that it refers to; comments do not count."""
    content = load_yaml(path)
    text = json.dumps(content, default=str)
    for _, value in strings(content):
        inner = path.parent / value
        if value.endswith((".yaml", ".yml", ".json")) and inner.is_file() and inner not in seen:
            text += f"\n{config_content(inner, seen | {path, inner})}"
    return text


def strings(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every string of a nested value with the keys above it.

    Example:
        >>> list(strings({"data": {"root": "x"}, "callbacks": ["A"]}))
        [(('data', 'root'), 'x'), (('callbacks',), 'A')]
    """
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(item, (*where, str(key)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item, where)


def local_data(content: Any, exclude: Iterable[Path] = ()) -> set[str]:
    """The local files and folders that a configuration names as something to read.

    A string counts when it names an existing file; below ``data`` also when it names a folder, elsewhere only with a
    separator in it. Folders of caches and outputs, folders that hold the working directory, and YAML files (whose
    content is in the key) do not.

    Args:
        content: a configuration.
        exclude: folders whose content is known otherwise.
    """
    here = Path.cwd().resolve()
    outside = [folder.resolve() for folder in exclude]
    found = set(_shared(content))
    roots = {str(Path(text).parent) for text in found}
    for where, text in strings(content):
        if str(Path(text)) in roots:
            continue
        if not text or len(text) > 1000 or "\n" in text or "://" in text or any(map(NOT_READ.search, where)):
            continue
        path = Path(text).expanduser()
        try:
            folder, file = path.is_dir(), path.is_file()
        except (OSError, ValueError):
            continue
        path = path.resolve()
        if (file and path.suffix in (".yaml", ".yml")) or any(path.is_relative_to(other) for other in outside):
            continue
        if folder and (here.is_relative_to(path) or not (where[:1] == ("data",) or "/" in text or os.sep in text)):
            continue
        if file or folder:
            found.add(text)
    return found


def _shared(content: Any) -> Iterator[str]:
    """The data set's own files where its folder may hold others too."""
    if isinstance(content, Mapping):
        arguments = content.get("init_args")
        root = arguments.get("root") if isinstance(arguments, Mapping) else None
        patterns = SHARED_ROOTS.get(str(content.get("class_path")).rpartition(".")[2], ())
        if isinstance(root, str) and Path(root).expanduser().is_dir():
            for pattern in patterns:
                for path in sorted(Path(root).expanduser().glob(pattern)):
                    yield str(Path(root) / path.name)
        for value in content.values():
            yield from _shared(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _shared(value)


def fingerprints(paths: Iterable[str]) -> dict[str, str]:
    """The fingerprint of each path, see :func:`fingerprint`."""
    return {path: fingerprint(path) for path in sorted(paths)}


@lru_cache(maxsize=1024)
def fingerprint(path: str) -> str:
    """A cheap mark of the content of a file or folder.

    Files of up to 32 MiB are read; larger ones, and those in folders of more than 64 files, count by size and time of
    change; of more than 20 000 files only the names count. Kept in memory: ``fingerprint.cache_clear()`` forgets.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return _file_mark(root, read=True)
    if not root.is_dir():
        return "missing"
    files = sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    digest = hashlib.sha256()
    for file in files:
        mark = "" if len(files) > CROWD else _file_mark(file, read=len(files) <= MANY)
        digest.update(f"{file.relative_to(root).as_posix()}\0{mark}\0".encode())
    return digest.hexdigest()[:16]


def _file_mark(path: Path, read: bool) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"
    if read and found.st_size <= LARGE:
        return file_content(path)[:16]
    return f"{found.st_size} {found.st_mtime_ns}"
