"""The tests of other devices, which run in a process of their own: they register a device."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(sys.platform != "linux", reason="the device for tests is built on Linux only")
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
def test_masks_and_training_on_another_device(tmp_path: Path):
    """Defends every path for CUDA and MPS, as far as a machine without them can."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / "devices")],
        env={**own, "PURPRUNE_TEST_DEVICE": "apart", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=TESTS.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.returncode == 0, run.stdout
