"""The argument parser of the commands that are not LightningCLI's."""

from __future__ import annotations

import argparse

from torchlethe._cli.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, so that the command says them in its own way."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing the usage.

        Args:
            message: what argparse found.

        Raises:
            UsageError: always.
        """
        raise UsageError(message)
