"""Two ranks with half the batch each compute what one process computes."""

import socket
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.lightning_modules.runs import joined
from torchlethe.io import read_state_dict


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.lightning_modules.runs", "ranks", str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return folder


@pytest.mark.parametrize("kind", ["classifier", "sfron", "sfron_auto"])
def test_the_joined_batch_gives_the_same_weights_and_scores(kind, two_ranks, tmp_path):
    joined(kind, 60, tmp_path)
    alone, together = (read_state_dict(folder / f"{kind}.safetensors") for folder in (tmp_path, two_ranks))
    assert alone.keys() == together.keys()
    assert "score.test_accuracy" in alone
    if kind == "sfron_auto":
        assert len(alone["alpha"]) > 2  # the strength and more than one trial
    for name in alone:
        # torchmetrics keeps scores in float32; one sample more or less would change them by 1e-3
        tolerance = 1e-6 if name.startswith("score.") else 1e-10
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=tolerance)
