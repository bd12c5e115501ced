"""Where a study ran: versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torchlethe", "torch", "torchvision", "lightning", "torchmetrics", "numpy", "scikit-learn")


def environment(folder: Path) -> dict[str, str]:
    """Describe this machine and its software.

    Args:
        folder: where the study file lies, for the commit of its repository.

    Returns:
        Texts by label, in the order to show them; nothing that identifies the user or the machine's name.
    """
    import torch

    found = {"processor": f"{_processor()}, {os.cpu_count()} cores"}
    if memory := _memory():
        found["memory"] = f"{memory:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["accelerator"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit(folder):
        found["commit"] = commit
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _commit(folder: Path) -> str:
    """The commit that the study file belongs to, with a mark when the working tree differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit} with changes" if commit and git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.TimeoutExpired):
        return ""
