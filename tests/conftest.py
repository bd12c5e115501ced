"""Fixtures that every folder shares; one thread per process, as spinning threads slow small steps down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from torchlethe._cli.cleaning import unpatch_loaders

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_loader_classes():
    """Lightning leaves DataLoader patched when a loader's hook raises; a test must not meet what another left."""
    yield
    unpatch_loaders()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and weights, which a user's clone does not have."""
    folder = Path(os.environ.get("LETHE_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the shared data folder is absent")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs and outputs of the official implementations."""
    return Path(__file__).parent / "golden"
