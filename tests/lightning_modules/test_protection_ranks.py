"""Two ranks that share the images protect, prepare and report as one process does."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.lightning_modules.protection_ranks import protect, write_ensemble
from torchlethe.data import read_protected


def test_two_ranks_write_what_one_process_writes(tmp_path):
    ensemble, ranked, alone = write_ensemble(tmp_path / "ensemble"), tmp_path / "ranked", tmp_path / "alone"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.lightning_modules.protection_ranks", str(ranked)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port], cwd=ROOT, **pipes) for rank in range(2)]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    protect(alone, ensemble)
    first, second = (json.loads((folder / "reports.json").read_text()) for folder in (alone, ranked))
    for name in ("sep_fa", "ops", "em"):
        expected, found = (read_protected(folder / name / "protected") for folder in (alone, ranked))
        assert torch.equal(found.indices, torch.arange(101))
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.images, expected.images), name
        assert second[name] == pytest.approx(first[name], rel=1e-9), name
        assert first[name]["images"] == 101
        assert len(list((ranked / name / "prepared").iterdir())) == 1
