"""Two ranks: the joined batch with global scope, each rank's own climb with local scope."""

import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.callbacks.sharpness_runs import (
    METHODS,
    RANK_RUNS,
    by_formulas,
    mlp,
    rank_main,
    rank_run,
    vector,
    without_callback,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_initialized() or not dist.is_gloo_available(),
    reason="forks two ranks that talk through gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One launch for all runs."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(rank_main, (str(folder),), nprocs=2, start_method="fork", join=False)
    deadline = time.monotonic() + 200
    try:
        while not context.join(timeout=max(0.1, deadline - time.monotonic())):  # returns as each rank ends
            if time.monotonic() > deadline:
                pytest.fail("the ranks wait for each other")
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def both(found, name):
    """What rank 0 found, after a look whether rank 1 has the same weights and state to the bit."""
    first, second = (ranks[name] for ranks in found)
    assert torch.equal(first["weights"], second["weights"])
    assert first["passes"] == second["passes"]
    for buffer, values in first["state"].items():
        assert values.keys() == second["state"][buffer].keys()
        assert all(torch.equal(value, second["state"][buffer][name]) for name, value in values.items())
    return first


TOGETHER = [name for name in RANK_RUNS if name.split(" ", 1)[1] in ("esam", "norms", "one-sided")]
EXACT = [name for name in RANK_RUNS if name.startswith("global") and name not in ("global esam", "global one-sided")]


@pytest.mark.parametrize("name", EXACT)
def test_global_scope_is_one_process_on_the_joined_batch(name, found):
    ranks = both(found, name)
    module, callback, _ = rank_run(name, 1)
    torch.testing.assert_close(ranks["weights"], vector(module.net), rtol=0, atol=1e-12)
    state = callback.state_dict()["memory"]
    assert state.keys() == ranks["state"].keys()
    for buffer, values in state.items():
        for param, value in values.items():
            torch.testing.assert_close(ranks["state"][buffer][param], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["optimizer", "hand"])
def test_optimizer_and_manual_step_on_two_ranks_are_one_process_on_the_joined_batch(how, found):
    first, second = (ranks["without"][how] for ranks in found)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, without_callback(how, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["", " twice"])
@pytest.mark.parametrize("method", METHODS)
def test_local_scope_is_the_simulation_of_two_climbs(method, form, found, folder):
    name = f"local {method}{form}"
    ranks, net = both(found, name), mlp()
    accumulate = 2 if form else 1
    formulas = by_formulas(net, method, ranks=2, count=112, rho=0.2, accumulate=accumulate, **METHODS[method])
    torch.testing.assert_close(ranks["weights"], vector(net), rtol=0, atol=1e-12)
    # what a checkpoint holds is the mean over ranks
    saved = torch.load(folder / f"{name}.ckpt", weights_only=True)["callbacks"]["SharpnessAware"]["memory"]
    assert saved.keys() == ranks["state"].keys()
    for values in saved.values():
        mean = sum(formulas.memory.values()) / 2
        torch.testing.assert_close(torch.cat([v.flatten() for v in values.values()]), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local part", {"moved": lambda name: "weight" in name}),
        ("local part twice", {"moved": lambda name: "weight" in name, "accumulate": 2}),
        ("local every third", {"interval": 3, "warmup": 1, "accumulate": 2}),
        ("local fsam twice, no views", {"accumulate": 2}),
        ("local wsam views", {"method": "wsam"}),
    ],
)
def test_options_with_local_scope(name, options, found):
    net = mlp()
    by_formulas(net, **{"method": "fsam", "ranks": 2, "count": 112, "rho": 0.2} | options)
    torch.testing.assert_close(both(found, name)["weights"], vector(net), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TOGETHER)
def test_both_ranks_stay_together(name, found):
    ranks = both(found, name)
    assert ranks["passes"] == [1, 2] * 7
    assert torch.isfinite(ranks["weights"]).all()


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("method", ["fsam", "wsam", "looksam"])
def test_an_overflow_on_one_rank_skips_the_step_on_both(method, bad_pass, found):
    first, second = (ranks[f"overflow {bad_pass} {method}"] for ranks in found)
    assert first["passes"] == second["passes"] == [1, 2] * 3 + [1, 2][:bad_pass] + [1, 2] * 3
    assert first["scale"] == second["scale"] == 2.0**9
    assert torch.equal(first["weights"], second["weights"])
    assert torch.isfinite(first["weights"]).all()


def test_a_local_run_resumes_to_the_same_bits(found):
    for ranks in found:
        assert torch.equal(ranks["resume"]["straight"], ranks["resume"]["resumed"])
    assert torch.equal(found[0]["resume"]["straight"], found[1]["resume"]["straight"])
