"""``lethe list``: what the package offers, read from its source without importing it.

A folder's ``__all__`` says what is public, the first sentence of a docstring says what it is. Reading instead of
importing keeps the command at a fraction of a second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchlethe._cli.errors import UsageError, suggest

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = {
    "modules": "lightning_modules",
    "datamodules": "datamodules",
    "callbacks": "callbacks",
    "models": "models",
    "optimizers": "optimizers",
}
KINDS = (*FOLDERS, "configs")
ALIASES = {"networks": "models"}


@dataclass(frozen=True)
class Entry:
    """One line of ``lethe list``.

    Attributes:
        name: what to write on the command line.
        summary: the first sentence of its documentation.
        group: the subfolder it lives in, or an empty string.
    """

    name: str
    summary: str
    group: str = ""


def configs_folder() -> Path:
    """The folder of the shipped configurations: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str) -> str:
    """Resolve a configuration by path, or by the name that ``lethe list configs`` shows.

    Args:
        name: a path as the user wrote it; ``configs/`` in front of a shipped name may stay or go.

    Returns:
        ``name`` itself if it exists or nothing shipped fits, otherwise the path of the shipped file.
    """
    if Path(name).exists():
        return name
    shipped = configs_folder() / name.removeprefix("./").removeprefix("configs/")
    return str(shipped) if shipped.is_file() else name


@cache
def entries(kind: str) -> tuple[Entry, ...]:
    """Everything of one kind, by group and name.

    Args:
        kind: one of ``modules``, ``datamodules``, ``callbacks``, ``models``, ``optimizers``, ``configs``.
    """
    if kind == "configs":
        folder = configs_folder()
        return tuple(
            Entry(path.relative_to(folder).as_posix(), _first_comment(path)) for path in sorted(folder.rglob("*.yaml"))
        )
    folder = PACKAGE / FOLDERS[kind]
    public = _public(folder / "__init__.py")
    found: dict[str, Entry] = {}
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():
        group = path.parent.relative_to(folder).as_posix()
        for name, summary in _definitions(path):
            if (public is None or name in public) and (kind != "callbacks" or name in _callbacks()):
                found.setdefault(name, Entry(name, summary, "" if group == "." else group))
    return tuple(sorted(found.values(), key=lambda entry: (entry.group, entry.name.lower())))


def _public(path: Path) -> set[str] | None:
    """The literal strings of ``__all__``; None when there is none."""
    if not path.is_file():
        return None
    names: set[str] = set()
    seen = False
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and getattr(target, "id", "") == "__all__":
            seen = True
            names |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return names if seen else None


def _definitions(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, first_sentence(ast.get_docstring(node) or "")


@cache
def _callbacks() -> frozenset[str]:
    """The classes in the callbacks' folder that derive from a class of Lightning, by way of others or not."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (PACKAGE / FOLDERS["callbacks"]).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("lightning.pytorch")]
    known = {alias.asname or alias.name for node in imports for alias in node.names}
    parents = {n.name: {ast.unparse(b).split(".")[-1] for b in n.bases} for n in nodes if isinstance(n, ast.ClassDef)}
    while more := {name for name, bases in parents.items() if bases & known and name not in known}:
        known |= more
    return frozenset(known & parents.keys())


def first_sentence(text: str) -> str:
    r"""The first sentence of a docstring, on one line.

    Example:
        >>> first_sentence("Trains e.g. digits.  Fast.\n\nArgs: none")
        'Trains e.g. digits.'
    """
    paragraph = " ".join(text.split("\n\n")[0].split())
    paragraph = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``(.+?)``", lambda role: role[1] or role[2], paragraph)
    end = re.search(r"\.(?= [A-Z]|$)|:$", paragraph)
    return paragraph[: end.end()].rstrip(":") if end else paragraph


def _first_comment(path: Path) -> str:
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#"):
            return first_sentence(line.lstrip("# "))
        break
    return ""


def show(words: Sequence[str]) -> int:
    """Print the tables of ``lethe list [KIND …]``.

    Args:
        words: kinds to show, ``networks`` being another word for ``models``; all of them by default.

    Returns:
        The exit status.
    """
    from rich.console import Console
    from rich.table import Table

    if any(word in ("-h", "--help") for word in words):
        Console().print(f"usage: lethe list [{' | '.join(KINDS)}]", markup=False, highlight=False)
        return 0
    words = [ALIASES.get(word, word) for word in words]
    for word in words:
        if word not in KINDS:
            raise UsageError(f"there is no list of '{word}'{suggest(word, KINDS)}")
    console = Console()
    for kind in words or KINDS:
        found = entries(kind)
        if not found:
            continue
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True, style="cyan")
        if any(entry.group for entry in found):
            table.add_column(no_wrap=True, style="dim")
        table.add_column(ratio=1)
        for entry in found:
            cells = (entry.name, entry.group, entry.summary) if len(table.columns) == 3 else (entry.name, entry.summary)
            table.add_row(*cells)
        console.print(table)
        if kind == "models":
            console.print("class_path: torchlethe.models.NAME", style="dim", highlight=False)
        console.print()
    return 0
