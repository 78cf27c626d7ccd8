"""The device that these tests run on."""

from __future__ import annotations

import os
from pathlib import Path

import apart
import pytest
import torch


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the device; the one that is built here needs a C++ compiler."""
    folder = os.environ.get("PURPRUNE_TEST_DEVICE_CACHE")
    return apart.device_for_tests(Path(folder) if folder else tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="session")
def memory(device: str) -> object:
    """Return what counts the device's memory, as ``torch.cuda`` does."""
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        pytest.skip(f"torch counts no memory of {device}")
    return module


@pytest.fixture(scope="session")
def is_exact(device: str) -> bool:
    """Return whether the device computes as the CPU does; a GPU adds in another order."""
    return device == apart.NAME


collect_ignore_glob = [] if "PURPRUNE_TEST_DEVICE" in os.environ else ["test_*.py"]
