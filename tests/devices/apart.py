"""A device for tests, for machines without a GPU; and how to name a real one instead.

``PURPRUNE_TEST_DEVICE=cuda python -m pytest tests/devices`` runs the same tests on a GPU.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch

NAME = "apart"
_SOURCE = Path(__file__).with_name("apart.cpp")


def device_for_tests(folder: Path) -> str:
    """Return the device that the environment names; the one of this module is built in a folder."""
    name = os.environ.get("PURPRUNE_TEST_DEVICE", NAME)
    if name == NAME and torch._C._get_privateuse1_backend_name() != NAME:
        _register(_built(folder))
    return name


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler that builds the device; None: there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if command and shutil.which(command[0]) else None


def _built(folder: Path) -> Path:
    """Return the library, which is built once for each torch and compiler."""
    from torch.utils.cpp_extension import include_paths, library_paths  # needs setuptools

    command = compiler()
    if command is None:
        raise RuntimeError("Expected a C++ compiler to build the device for tests; set CXX.")
    command += ["-O1", "-std=c++20", "-shared", "-fPIC", str(_SOURCE)]
    known = [_SOURCE.read_text("utf-8"), torch.__version__, *command]
    told_apart = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    library = folder / f"{NAME}-{told_apart}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        fresh = Path(unfinished) / library.name
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-L{path}" for path in library_paths()]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(fresh)], check=True)
        fresh.rename(library)
    return library


def _register(library: Path) -> None:
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    offers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "memory_allocated": torch.ops.apart.memory_allocated,
        "max_memory_allocated": torch.ops.apart.max_memory_allocated,
        "reset_peak_memory_stats": torch.ops.apart.reset_peak_memory_stats,
    }
    vars(module).update(offers)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
