"""Push and pull: collect and check in a folder of its own, then move everything into place in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from torchlethe._cli.errors import UsageError
from torchlethe.files import file_hash, remove_stale
from torchlethe.hub.card import Facts, card
from torchlethe.hub.safety import check_folder, check_names, command_without_paths, without_paths
from torchlethe.io import SUFFIXES, read_state_dict, save_weights

CARD, WEIGHTS, CONFIG, EVALUATION, REPORT = (
    "README.md",
    "model.safetensors",
    "config.yaml",
    "evaluation.json",
    "report.html",
)
TABLES = ("table.md", "table.csv", "table.tex")
LAYOUT = (CARD, WEIGHTS, CONFIG, EVALUATION, REPORT, *TABLES)


def push(
    source: str | Path,
    destination: str | Path,
    *,
    report: str | Path | None = None,
    evaluation: str | Path | None = None,
    license: str = "unknown",
    private: bool = False,
) -> str:
    """Publish weights, or a study's report, with a model card.

    Args:
        source: the folder of a run, whose ``weights.safetensors``, ``config.yaml`` and ``evaluation.json`` are taken;
            a weight file as :func:`torchlethe.io.read_state_dict` reads it, which is converted; or the folder of a
            study, whose report goes alone.
        destination: a repository on the Hub (``name/repository``), which is made if need be; or a folder, written as
            an absolute path, with ``./`` in front or as ``folder:PATH``, or one that exists.
        report: the folder of a study (or its ``report.html``), whose report and tables go along.
        evaluation: an ``evaluation.json`` of these weights, in place of the run's own.
        license: the licence of the weights, in the Hub's words (``apache-2.0``).
        private: whether only the owner sees the repository.

    Returns:
        The URL of the repository, or the folder.

    Raises:
        FileNotFoundError: there is no such source, report or evaluation.
        ValueError: the weights were refused, the destination is taken, or the Hub refused.

    Note:
        Absolute paths in the configuration and evaluation are shortened. ``evaluation.npz`` stays at home: it tells
        which samples were to be forgotten.
    """
    folder = local_folder(destination)
    if folder is not None:
        if private:
            raise UsageError(f"--private is for the Hub, but the destination '{destination}' is a folder")
        _check_replaceable(folder)
    with _staging(folder) as staged:
        _collect(Path(source), staged, str(destination), report, evaluation, license)
        check_folder(staged, str(source))
        if folder is None:
            from torchlethe.hub.remote import upload

            return upload(staged, str(destination), LAYOUT, private)
        _move(staged, folder)
        return str(folder)


def pull(source: str | Path, folder: str | Path, *, revision: str | None = None) -> Path:
    """Fetch a repository; a file that could execute code refuses the whole.

    Args:
        source: a repository on the Hub (``name/repository``), or a folder as for :func:`push`.
        folder: where to put it: new, empty, or from an earlier push or pull.
        revision: branch, tag or commit on the Hub.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: the source is a folder that does not exist.
        ValueError: the source was refused, the folder is taken, or the Hub refused.
    """
    target = Path(folder).expanduser()
    _check_replaceable(target)
    origin = local_folder(source)
    if origin is not None and revision:
        raise UsageError(f"--revision {revision} is for the Hub, but the source '{source}' is a folder")
    if origin is not None and not origin.is_dir():
        raise FileNotFoundError(f"there is no folder '{origin}' to pull from.")
    if origin is not None and target.resolve().is_relative_to(origin.resolve()):
        raise UsageError(f"the folder '{target}' is the source '{source}' or inside of it; choose another one")
    with _staging(target) as staged:
        if origin is not None:
            check_names((p.relative_to(origin).as_posix() for p in origin.rglob("*") if not p.is_dir()), str(source))
            shutil.copytree(origin, staged, symlinks=True, dirs_exist_ok=True)
        else:
            from torchlethe.hub.remote import download

            download(str(source), staged, revision)
        check_folder(staged, str(source))
        _move(staged, target)
    return target


def local_folder(place: str | Path) -> Path | None:
    """The folder that a source or destination names; None for a repository on the Hub.

    Args:
        place: ``name/repository``, or a path: absolute, beginning with ``.`` or ``~``, after ``folder:``, or existing.

    Example:
        >>> local_folder("ada/digits") is None, local_folder("folder:ada/digits").as_posix()
        (True, 'ada/digits')
    """
    text = str(place)
    if text.startswith("folder:"):
        return Path(text.removeprefix("folder:")).expanduser()
    path = Path(text).expanduser()
    is_path = isinstance(place, Path) or path.is_absolute() or text.startswith(".") or path.exists()
    return path if is_path else None


def _collect(
    source: Path, staged: Path, destination: str, report: str | Path | None, evaluation: str | Path | None, licence: str
) -> None:
    """Write everything of the layout that the source has."""
    if not source.exists():
        raise FileNotFoundError(f"there is no run or weight file '{source}'.")
    facts = Facts(title=Path(destination.removeprefix("folder:")).name, licence=licence)
    if local_folder(destination) is None:
        facts.repository = destination
    weights = _weights(source)
    if weights is None:
        if evaluation is not None:
            raise UsageError(f"--evaluation needs weights, but '{source}' holds only a report")
        report = report or source
    else:
        facts.tensors = _network_state(weights)
        save_weights(facts.tensors, staged / WEIGHTS)
    if weights is not None and source.is_dir():
        facts.config = without_paths(_read(source / CONFIG, yaml.safe_load))
        stage = _read(source / "stage.json", json.loads)
        facts.command = command_without_paths(str(stage.get("command", "")))
        evaluation = evaluation or (source / EVALUATION if (source / EVALUATION).is_file() else None)
    if evaluation is not None:
        if not Path(evaluation).is_file():
            raise FileNotFoundError(f"there is no evaluation '{evaluation}'.")
        facts.evaluation = without_paths(_read(Path(evaluation), json.loads))
        judged = (facts.evaluation.get("meta") or {}).get("weights") or {}
        if weights is not None and judged and judged.get("sha256") != file_hash(weights):
            raise UsageError(f"'{evaluation}' is the evaluation of other weights, not of '{weights}'")
    if facts.config:
        text = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
        (staged / CONFIG).write_text(f"# The whole configuration of the run.\n{text}", "utf-8")
    if facts.evaluation:
        (staged / EVALUATION).write_text(json.dumps(facts.evaluation, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if report is not None:
        facts.table = _copy_report(Path(report), staged)
        facts.report = REPORT
    (staged / CARD).write_text(card(facts), "utf-8")


def _weights(source: Path) -> Path | None:
    """The weight file of a run; None for a study that has only its report."""
    if source.is_file():
        return source
    if (source / "weights.safetensors").is_file():
        return source / "weights.safetensors"
    found = sorted(path.name for path in source.iterdir() if path.name.endswith(SUFFIXES))
    if len(found) == 1:
        return source / found[0]
    if found:
        raise UsageError(f"the folder '{source}' holds several weight files, {', '.join(found)}: give one of them")
    if (source / REPORT).is_file():
        return None
    deeper = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*.ckpt"))
    hint = f"; there is '{source / deeper[-1]}'" if deeper else "; give a weight file or the folder of a finished fit"
    raise UsageError(f"the folder '{source}' holds no weights.safetensors{hint}")


def _network_state(path: Path) -> dict[str, Any]:
    """The tensors of a weight file, without the name that a module of Lethe gives its network."""
    state = read_state_dict(path)
    if path.suffix == ".ckpt" and all(name.startswith("network.") for name in state):
        return {name.removeprefix("network."): value for name, value in state.items()}
    return state


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """A mapping out of a YAML or JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' is damaged: it holds no mapping")
    return content


def _copy_report(source: Path, staged: Path) -> str:
    folder = source if source.is_dir() else source.parent
    page = source / REPORT if source.is_dir() else source
    if not page.is_file() or page.suffix != ".html":
        raise UsageError(f"there is no report '{page}': give the folder of a study, or its report.html")
    shutil.copyfile(page, staged / REPORT)
    for name in TABLES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    return (staged / "table.md").read_text("utf-8") if (staged / "table.md").is_file() else ""


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder with anything that neither push nor pull wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, expected a folder")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in (*LAYOUT, ".gitattributes"))
    if foreign or (any(folder.iterdir()) and not (folder / CARD).is_file()):
        what = f"holds '{foreign[0]}'" if foreign else f"has no {CARD}"
        raise UsageError(f"the folder '{folder}' is not empty and {what}, so it is left alone; choose a new folder")


@contextlib.contextmanager
def _staging(target: Path | None) -> Iterator[Path]:
    """A folder to work in, beside the target, so that the last step is a move."""
    if target is None:
        with tempfile.TemporaryDirectory(prefix="lethe-") as name:
            yield Path(name)
        return
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.absolute())
    staged = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _move(staged: Path, target: Path) -> None:
    """Put the staged folder in the target's place; the old one goes only when the new one stands."""
    umask = os.umask(0)
    os.umask(umask)
    staged.chmod(0o777 & ~umask)  # mkdtemp makes private folders
    if not target.exists():
        os.rename(staged, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}.", suffix=".tmp"))
    os.rename(target, old / target.name)
    try:
        os.rename(staged, target)
    except OSError:
        os.rename(old / target.name, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
