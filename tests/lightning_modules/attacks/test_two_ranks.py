"""Two ranks with half the batch each craft what one process crafts."""

import socket
import subprocess
import sys

from tests.conftest import ROOT
from tests.lightning_modules.attacks.attack_runs import joined
from torchlethe.io import read_state_dict


def test_the_joined_batch_gives_the_same_perturbation_and_scores(tmp_path):
    ranked, alone = tmp_path / "ranked", tmp_path / "alone"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.lightning_modules.attacks.attack_runs", str(ranked)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port], cwd=ROOT, **pipes) for rank in range(2)]
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    joined(100, alone)
    first, second = (read_state_dict(folder / "attacks.safetensors") for folder in (alone, ranked))
    assert first.keys() == second.keys()
    assert {"fg.v", "nag.v", "fg.test_fooling_ratio"} <= first.keys()
    for name in first:
        tolerance = 1e-6 if "test" in name else 1e-10
        assert float((second[name] - first[name]).abs().max()) <= tolerance, name
