"""Two ranks with half the batch each craft what one process crafts."""

from tests.lightning_modules.attacks.attack_runs import joined
from tests.two_ranks import run_two_ranks
from torchlethe.io import read_state_dict


def test_the_joined_batch_gives_the_same_perturbation_and_scores(tmp_path):
    ranked, alone = tmp_path / "ranked", tmp_path / "alone"
    run_two_ranks("tests.lightning_modules.attacks.attack_runs", ranked)
    joined(100, alone)
    first, second = (read_state_dict(folder / "attacks.safetensors") for folder in (alone, ranked))
    assert first.keys() == second.keys()
    assert {"fg.v", "nag.v", "fg.test_fooling_ratio"} <= first.keys()
    for name in first:
        tolerance = 1e-6 if "test" in name else 1e-10
        assert float((second[name] - first[name]).abs().max()) <= tolerance, name
