"""The tests of other devices, which run in a process of their own: they register a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _compiles() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None and sys.platform == "linux"


@pytest.mark.skipif(not _compiles(), reason="the device for tests is built by a C++ compiler")
def test_masks_and_training_on_another_device():
    """Defends every path for CUDA and MPS, as far as a machine without them can."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(TESTS / "devices")],
        env={**os.environ, "PURPRUNE_TEST_DEVICE": "apart"},
        cwd=TESTS.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.returncode == 0, run.stdout
