"""Importing this module imports everything that most runs need, and prepares the command line of a fit.

Worker processes are copies of one process that has imported it, see :mod:`torchlethe.study.workers`: they begin where a
cold start would be after seconds. No tensor is computed here, as a process with threads or a CUDA context must not be
copied.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os

COMMON = ("sklearn.datasets", "sklearn.linear_model", "torchlethe.checkpoint_io")

# a line to no one in particular must not go to the terminal of whoever imports this
with (
    contextlib.suppress(Exception),
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
):
    for _name in COMMON:
        importlib.import_module(_name)
    from torchlethe._cli.lightning import run

    # --print_config ends in SystemExit, which `suppress(Exception)` would let through
    with contextlib.suppress(SystemExit):
        run("fit", ["--model=Classifier", "--data=DigitsDataModule", "--print_config", f"--config={os.devnull}"])
gc.collect()
gc.freeze()  # what is there now is never freed, so that copies share its memory
