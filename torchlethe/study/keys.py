"""What a result depends on: the key of a job, and in which part two keys differ.

A key covers the command, the content of the configuration files, every setting, the content of the files that other
stages made, and the code: the source of ``torchlethe`` and of every module outside of it that a ``class_path`` names.
Names of stages, folders and files do not count, so equal stages of two studies have equal keys. Local data is looked at
apart from the key, see :mod:`~torchlethe.study.fingerprints`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlethe.study.files import DONE, read_json
from torchlethe.study.fingerprints import config_content, file_content
from torchlethe.study.spec import OUTPUTS, REFERENCE

if TYPE_CHECKING:
    from torchlethe.study.plan import Job

PACKAGE = Path(__file__).resolve().parents[1]
# updating these changes a lot of things a little; their versions are recorded with the study, but do not count
FRAMEWORKS = frozenset({"torch", "lightning", "pytorch_lightning", "torchvision", "torchmetrics", "torchlethe"})
# what is around the stages: it plans, starts, judges from outside, reports and publishes
AROUND = (
    "study/",
    "hub/",
    "evaluate.py",
    "cli.py",
    *(f"_cli/{name}.py" for name in ("catalog", "checking", "errors", "judge", "parser", "paths", "warm")),
)
SEARCH = ("study/search.py", "study/search_space.py")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Identity:
    """What a job's result depends on.

    Attributes:
        key: SHA-256 over all of it.
        parts: readable values or hashes by name, to say what changed.
    """

    key: str
    parts: Mapping[str, str]


def identify(job: Job) -> Identity:
    """The identity of a job, from the files as they are now; an input that does not exist counts as missing."""
    parts: dict[str, str] = {"the command": job.stage.command}
    digest = [job.stage.command]

    def add(name: str, value: str, hashed: str | None = None) -> None:
        while name in parts:  # a key that ends in `+` may come several times
            name += "+"
        parts[name] = value
        digest.append(value if hashed is None else hashed)

    contents = {reference: file_content(path) for reference, path in job.inputs.items()}
    documents: list[Any] = []
    for path in job.files:
        reference = next((name for name, file in job.inputs.items() if file == path), None)
        if reference is None:
            text = config_content(path) if path.is_file() else "missing"
            documents.append(text)
            add(f"the file {path.name}", _short(text), text)
        else:
            add(f"the place of ${{{reference}}}", "", contents[reference])
    for word in job.template:
        name, _, value = word.removeprefix("--").partition("=")
        documents.append(value)
        add(name, value, f"{name}={REFERENCE.sub(lambda match: _content(job, match[1], contents), value)}")
    for reference in sorted(contents):
        parts[f"${{{reference}}}"] = _short(contents[reference])  # its content is in the digest where it is used
    used = {reference.partition(".")[0] for word in job.template for reference in REFERENCE.findall(word)}
    used |= {reference.partition(".")[0] for reference in job.inputs}
    for need in job.needs:
        if need.stage.base not in used:
            add(f"the result of {need.stage.base}", _result(need.folder))
    if job.stage.search is not None:
        add("search", json.dumps(job.stage.search, default=str))
    searched = job.stage.search is not None
    add("the code of torchlethe", code_version(searched))
    for module in sorted(_modules(documents) | ({"optuna"} if searched else set())):
        add(f"the code of {module}", module_version(module))
    return Identity(hashlib.sha256("\0".join(digest).encode()).hexdigest(), parts)


def difference(before: Mapping[str, str], after: Mapping[str, str], ignore_code: bool = False) -> str:
    """What changed between the parts of two identities, in words; empty when nothing did.

    Args:
        before: the recorded parts.
        after: the present ones.
        ignore_code: do not mention code.

    Example:
        >>> difference({"model.alpha": "3"}, {"model.alpha": "5"})
        'model.alpha changed (3 → 5)'
    """
    found = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old == new or (ignore_code and name.startswith("the code of")):
            continue
        label = name.rstrip("+")
        if old is None or new is None:
            found.append(f"{label} is {'new' if old is None else 'gone'}")
        elif label.startswith(("the ", "$")) or max(len(old), len(new)) > 40:
            found.append(f"{label} changed")
        else:
            found.append(f"{label} changed ({old} → {new})")
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more changes" if len(found) > 3 else "")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(job: Job, reference: str, contents: Mapping[str, str]) -> str:
    """What stands for a reference in the key: the content of a file, or the identity of a whole folder."""
    if reference in contents:
        return contents[reference]
    base, _, kind = reference.partition(".")
    need = next((need for need in job.needs if need.stage.base == base), None)
    return _result(need.folder) if need is not None and kind in OUTPUTS else reference


def _result(folder: Path) -> str:
    weights = folder / OUTPUTS["weights"]
    return f"{read_json(folder / DONE).get('key', 'missing')} {file_content(weights) if weights.is_file() else ''}"


@lru_cache(maxsize=2)
def code_version(search: bool = False) -> str:
    """A hash over the source of ``torchlethe`` but for what changes no result of a stage, see ``AROUND``.

    Not the version's number, which stays the same from one commit to the next.

    Args:
        search: whether the part that tries out settings counts too.
    """
    counted = set(SEARCH if search else ())
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(AROUND):
            counted.add(place)
    return _source_hash((PACKAGE / place for place in counted), PACKAGE)


def code_has_changed(identity: Identity) -> bool:
    """Whether the source of ``torchlethe`` on the disk is another than when a job was identified."""
    now = getattr(code_version, "__wrapped__", code_version)  # not what this process remembers
    try:
        return identity.parts["the code of torchlethe"] not in {now(searched) for searched in (False, True)}
    except OSError:  # a file is being replaced
        return True


def report_key(study: Path, jobs: Iterable[Job], words: Iterable[str]) -> str:
    """What a report depends on: the study file, the results, the command line, and the code that writes it.

    Args:
        study: the study file.
        jobs: all of its jobs.
        words: the command line.
    """
    digest = hashlib.sha256("\0".join([file_content(study), *words]).encode())
    for job in jobs:
        digest.update((job.folder / DONE).read_bytes() if (job.folder / DONE).is_file() else b"missing")
    files = [path for pattern in ("*.py", "*.j2") for path in PACKAGE.rglob(pattern)]
    return f"{digest.hexdigest()} {_source_hash(files, PACKAGE)}"


@lru_cache(maxsize=256)
def module_version(name: str) -> str:
    """The version of an installed distribution, or a hash over the source of a module or package that is none.

    Args:
        name: of a top-level module; the modules beside it that it imports count too.
    """
    spec = _find(name)
    locations = list((spec.submodule_search_locations or []) if spec else [])
    if spec is None or (spec.origin is None and not locations):
        return "missing"
    if re.search(r"[/\\](site|dist)-packages[/\\]", spec.origin or locations[0]):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    if locations:
        return _source_hash((path for folder in locations for path in Path(folder).rglob("*.py")), Path(locations[0]))
    return _source_hash(_imported(Path(spec.origin or "")), Path(spec.origin or "").parent)


@lru_cache(maxsize=4096)
def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _imported(path: Path) -> set[Path]:
    """A module and those in the same folder that it imports, by way of others or not."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found or current.suffix != ".py" or not current.is_file():
            continue
        found.add(current)
        for node in ast.walk(ast.parse(current.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            waiting += [current.parent / f"{name.split('.')[0]}.py" for name in names if name]
    return found


def _source_hash(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(os.path.relpath(path, root).replace(os.sep, "/").encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _modules(documents: Iterable[str]) -> set[str]:
    """The top-level modules outside of the frameworks and the standard library that dotted names begin with."""
    names = {found.split(".")[0] for text in documents for found in DOTTED.findall(text)}
    return {name for name in names - FRAMEWORKS - sys.stdlib_module_names if _find(name) is not None}
