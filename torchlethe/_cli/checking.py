"""Reading the configuration of a run without running it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from torchlethe._cli.errors import explain, is_readable
from torchlethe._cli.lightning import LetheCLI, run


class _ReadError(Exception):
    """Ends a run when its configuration has been read."""


class ReadingCLI(LetheCLI):
    """A call of LightningCLI that ends before it makes anything."""

    def _note(self, text: str) -> None:
        """Notes are for the run itself."""

    def _kept(self, parser: LightningArgumentParser) -> dict[str, dict[str, str]]:
        """Parsing once more is for a note."""
        return {}

    def _parse_ckpt_path(self) -> None:
        """Take over the hyper-parameters of a checkpoint that is there already."""
        path = self.config[self.command].get("ckpt_path")
        if path and Path(path).is_file():
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Check what the run would check, and go no further."""
        super().before_instantiate_classes()
        raise _ReadError


def check(command: str, words: Sequence[str]) -> str:
    """What is wrong with the configuration of a run.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        words: the command line after it.

    Returns:
        One sentence; empty when the configuration can be read, or fails in a way that only the run itself can tell.
    """
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            run(command, words, ReadingCLI)
    except _ReadError:
        return ""
    except Exception as error:  # a module of the user's own may raise anything
        return explain(error) if is_readable(error) else ""
    except SystemExit:
        return ""
    return ""
