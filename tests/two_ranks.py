"""Two real ranks over gloo: a test starts a script of the tests twice; in the script, each process is one of two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from tests.conftest import ROOT


def run_two_ranks(module: str, *arguments: str | Path) -> None:
    """Run ``python -m module ARGUMENTS RANK PORT`` as two ranks; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port], cwd=ROOT, **pipes) for rank in range(2)]
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)


@contextmanager
def one_of_two_ranks() -> Iterator[Callable[[], dict[str, Any]]]:
    """Be the rank that the command line ends with; gives what a Trainer needs for it, anew for each Trainer."""
    rank, port = sys.argv[-2:]
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_RANK": rank, "NODE_RANK": "0"}

    def trainer_arguments() -> dict[str, Any]:
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
        return {"devices": 2, "strategy": strategy}

    yield trainer_arguments
    # gloo's threads can abort an interpreter that ends before they do
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
