"""Tests whose body runs in every process of a process group, on the CPU with gloo.

All tests of a module that want the same number of processes share one group of them: starting
torch takes longer than most tests. A test that fails on one rank fails with that rank's traceback.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_DEADLINE = timedelta(seconds=60)
"""After this long without an answer a rank gives up: another one failed before its collective."""

Failures = dict[str, list[str]]


def on_ranks(*worlds: int) -> Callable[[Callable[[], None]], Any]:
    """Run the body of a test on every rank of groups of these sizes; more than 2 ranks is slow."""

    def decorate(body: Callable[[], None]) -> Any:
        sizes = [pytest.param(n, marks=pytest.mark.slow if n > 2 else ()) for n in worlds]

        @pytest.mark.parametrize("failures", sizes, indirect=True, ids="{} ranks".format)
        def test(failures: Failures) -> None:
            assert not failures[body.__name__], "\n".join(failures[body.__name__])

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Failures:
    """Run the chosen tests of this module on all ranks; return the tracebacks by test."""
    chosen = [
        item.originalname
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
        and item.callspec.params.get("failures") == request.param
    ]
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(request.param, request.module.__name__, chosen, folder)


def run_ranks(world: int, module: str, names: Sequence[str], folder: Path) -> Failures:
    """Run tests in a fresh group of processes; return the tracebacks by test."""
    mp.spawn(_rank, (world, module, list(names), folder), world)
    (folder / "store").unlink()
    found: Failures = {name: [] for name in names}
    for rank in range(world):
        for name, text in pickle.loads((folder / f"{rank}.pickle").read_bytes()).items():
            found[name].append(f"rank {rank}:\n{text}")
    return found


def _rank(rank: int, world: int, module: str, names: list[str], folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    tests = importlib.import_module(module)
    start = (folder / "store").as_uri()
    dist.init_process_group("gloo", start, _DEADLINE, world_size=world, rank=rank)
    for name in names:
        try:
            getattr(tests, name).body()
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(failures))
    sys.stdout.flush()
    dist.destroy_process_group()


def same_on_all_ranks(*values: Any) -> None:
    """Assert that all ranks have the same values, bit for bit."""
    mine = pickle.dumps([v.tolist() if isinstance(v, torch.Tensor) else v for v in values])
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    assert all(other == mine for other in all_of_them)
