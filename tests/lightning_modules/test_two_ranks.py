"""Two ranks with half the batch each compute what one process computes."""

import pytest
import torch

from tests.lightning_modules.runs import joined
from tests.two_ranks import run_two_ranks
from torchlethe.io import read_state_dict


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_two_ranks("tests.lightning_modules.runs", "ranks", folder)
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
