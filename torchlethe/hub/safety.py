"""What may travel: files that execute nothing, and descriptions that give no private path away."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from torchlethe._cli.errors import UsageError
from torchlethe.files import local_path

WEIGHTS = (".safetensors",)
TEXTS = (".md", ".txt", ".json", ".yaml", ".yml", ".tex", ".html")
TABLES = (".csv", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")
SUFFIXES = frozenset({*WEIGHTS, *TEXTS, *TABLES, *PICTURES})
NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE", ".gitattributes", ".gitignore"})
PATH = re.compile(r"""(?<![\w.~:/-])(?:~[\w-]*|[A-Za-z]:)?[/\\][^\s'",=\[\](){}]+""")


def check_names(names: Iterable[str], source: str) -> None:
    """Refuse a repository that holds more than weights, texts, tables and pictures.

    Args:
        names: its files, relative to its root.
        source: what to call it in the message.

    Raises:
        UsageError: a file has a suffix that is not known to be harmless.
    """
    for name in sorted(names):
        path = Path(name)
        if path.name not in NAMES and path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"'{source}' was refused: '{name}' could execute code when it is opened; only safetensors weights, "
                "texts, tables and pictures are taken"
            )


def check_folder(folder: Path, source: str) -> None:
    """The same for files that are here, with a look into the weights.

    Args:
        folder: the folder to check.
        source: what to call it in the message.

    Raises:
        UsageError: a file is a link, has another suffix, or calls itself safetensors and is not.
    """
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"'{source}' was refused: '{path.relative_to(folder)}' is no plain file")
    check_names((path.relative_to(folder).as_posix() for path in paths), source)
    for path in paths:
        if path.suffix.lower() == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                name = path.relative_to(folder)
                raise UsageError(f"'{source}' was refused: '{name}' is no safetensors file ({error})") from None


def without_paths(value: Any) -> Any:
    """The same values with absolute paths shortened, which would tell about the author's machine.

    What lies below the working directory keeps its place there, other paths keep their last part.

    Args:
        value: plain values, nested.

    Example:
        >>> without_paths({"weights": "/home/ada/runs/a/weights.safetensors", "lr": 0.1})
        {'weights': 'weights.safetensors', 'lr': 0.1}
    """
    if isinstance(value, str):
        return _shortened(value) if _is_absolute(value) else PATH.sub(lambda match: _shortened(match[0]), value)
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return value


def command_without_paths(command: str) -> str:
    """The same for a command line, whose options may hold JSON.

    Args:
        command: as a shell would take it.

    Example:
        >>> command_without_paths("lethe fit --model.weights=/home/ada/w.pt --trainer.max_epochs=3")
        'lethe fit --model.weights=w.pt --trainer.max_epochs=3'
    """
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        try:
            plain = json.loads(value)
        except ValueError:
            plain = None
        text = json.dumps(without_paths(plain)) if isinstance(plain, dict | list) else without_paths(value)
        words.append(option + equals + text)
    return shlex.join(words)


def _is_absolute(text: str) -> bool:
    # a sentence may begin with a slash, a path has no line break
    start = text.startswith(("/", "~", "file:/")) or bool(PureWindowsPath(text).drive and PureWindowsPath(text).root)
    return start and "\n" not in text and len(text) > 1


def _shortened(text: str) -> str:
    if PureWindowsPath(text).drive:
        return PureWindowsPath(text).name
    path = local_path(text).expanduser()
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
