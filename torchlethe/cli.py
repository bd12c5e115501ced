"""The ``lethe`` command: LightningCLI for single runs, studies for whole tables.

``--version``, ``--help`` and ``list`` answer without importing PyTorch; everything else is imported by the command that
needs it.

Example:
    >>> main(["list", "tables"])
    2
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torchlethe import __version__
from torchlethe._cli.errors import UsageError, explain, is_readable, suggest

LIGHTNING = {
    "fit": "train or unlearn",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "write predictions",
}
COMMANDS = {
    **LIGHTNING,
    "study": "run a graph of stages and write its table and report",
    "evaluate": "judge weights that were unlearned elsewhere",
    "push": "publish weights and reports with a model card",
    "pull": "fetch weights and reports, refusing unsafe files",
    "list": "show modules, datamodules, callbacks, models, configs",
}

HELP = f"""lethe {__version__} — what a model remembers and forgets

usage: lethe COMMAND [options]

{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

  --version   print the version
  --debug     show the traceback of an error (also: LETHE_DEBUG=1)

start here
  lethe study configs/digits/study.yaml             the demo: train, retrain, unlearn, compare
  lethe list                                        what there is
  lethe fit --model.help SFRon                      the arguments of one class
  lethe fit --config FILE.yaml --print_config       the whole configuration of a run
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the ``lethe`` command.

    Args:
        args: the words after ``lethe``; the process's own by default.

    Returns:
        The exit status: 0; 1 when a stage of a study failed; 2 after an error of the user, which is one sentence on
        standard error; 130 after an interrupt; 141 when nobody reads the output any more.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("LETHE_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    command, rest = (words[0], words[1:]) if words else ("help", [])
    name = f"lethe {command}" if command in COMMANDS else "lethe"
    try:
        status = _dispatch(command, rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has gone, as `head` does; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13  # as a command that SIGPIPE ended
    except SystemExit as stop:  # --help and --print_config of LightningCLI end this way
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 130
    except Exception as error:
        if debug or not is_readable(error):
            raise
        sys.stderr.write(f"{name}: error: {explain(error)}\n")
        return 2


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if command in ("--version", "version"):
        sys.stdout.write(f"lethe {__version__}\n")
        return 0
    if command in LIGHTNING:
        from torchlethe._cli.lightning import run

        run(command, rest)
        return 0
    if command == "list":
        from torchlethe._cli.catalog import show

        return show(rest)
    if command == "study":
        from torchlethe.study.command import study

        return study(rest, run_stage=_run_stage, check_stage=_check_stage)
    if command == "evaluate":
        from torchlethe.evaluate import evaluate

        return evaluate(rest)
    if command in ("push", "pull"):
        from torchlethe.hub import command as hub

        return hub.push(rest) if command == "push" else hub.pull(rest)
    raise UsageError(f"unknown command '{command}'{suggest(command, COMMANDS)}")


def _run_stage(command: str, rest: list[str]) -> None:
    """Run one stage of a study in this process: the seam through which the study stays independent of LightningCLI."""
    from torchlethe._cli.lightning import run

    run(command, rest)


def _check_stage(command: str, rest: list[str]) -> str:
    """What is wrong with the configuration of a stage, in one sentence; empty when nothing is."""
    from torchlethe._cli.checking import check

    return check(command, rest)


if __name__ == "__main__":
    sys.exit(main())
