"""Every test plans as a process of its own would: without what an earlier one remembers of files and code."""

import importlib

import pytest

from torchlethe.study.fingerprints import fingerprint
from torchlethe.study.keys import code_version, module_version


@pytest.fixture(autouse=True)
def fresh_memory():
    for function in (code_version, module_version, fingerprint):
        function.cache_clear()
    importlib.invalidate_caches()
