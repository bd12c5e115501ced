"""The files of a job's folder: their names, and reading and writing them so that a kill leaves no half of one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchlethe.files import atomic_write

DONE, STARTED, LOG, ERROR = "done.json", "stage.json", "log.txt", "error.txt"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty when it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one atomic step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file in one atomic step."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, "utf-8")
