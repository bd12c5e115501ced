"""Every test plans as a process of its own would: without what an earlier one remembers of files and code."""

import importlib

import pytest

from tests.study.digits import enter
from torchlethe.study.fingerprints import fingerprint
from torchlethe.study.keys import code_version, module_version


@pytest.fixture(autouse=True)
def fresh_memory():
    for function in (code_version, module_version, fingerprint):
        function.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """The working directory has the files of the digits study."""
    monkeypatch.chdir(tmp_path)
    enter(tmp_path)
