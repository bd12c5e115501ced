"""Two ranks that share the images protect, prepare and report as one process does."""

import json

import pytest
import torch

from tests.lightning_modules.protection_ranks import protect, write_ensemble
from tests.two_ranks import run_two_ranks
from torchlethe.data import read_protected


def test_two_ranks_write_what_one_process_writes(tmp_path):
    ensemble, ranked, alone = write_ensemble(tmp_path / "ensemble"), tmp_path / "ranked", tmp_path / "alone"
    run_two_ranks("tests.lightning_modules.protection_ranks", ranked)
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
