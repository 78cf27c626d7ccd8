"""Tests whose body runs in every process of a process group, on the CPU with gloo.

All tests that want the same number of processes share one group of them: starting torch takes
longer than most tests. A test that fails on one rank fails with that rank's traceback.
"""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
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
            found = failures[f"{body.__module__}:{body.__name__}"]
            assert not found, "\n".join(found)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


@pytest.fixture(scope="session")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Run the chosen tests on all ranks, once for all workers; return the tracebacks by test."""
    world = request.param
    chosen = [
        f"{item.module.__name__}:{item.originalname}"
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("failures") == world
    ]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / f"{world}-ranks"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            return run_ranks(world, chosen, folder)
    return read_failures(world, chosen, folder)


def run_ranks(world: int, names: Sequence[str], folder: Path) -> Failures:
    """Run tests in a fresh group of processes; return the tracebacks by test."""
    mp.spawn(_rank, (world, list(names), folder), world)
    (folder / "store").unlink(missing_ok=True)  # not every torch leaves it
    return read_failures(world, names, folder)


def read_failures(world: int, names: Sequence[str], folder: Path) -> Failures:
    """Read what the processes left in the folder."""
    found: Failures = {name: [] for name in names}
    for rank in range(world):
        for name, text in pickle.loads((folder / f"{rank}.pickle").read_bytes()).items():
            found[name].append(f"rank {rank}:\n{text}")
    return found


def _rank(rank: int, world: int, names: list[str], folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.7 warns of its own
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    start = f"file://{folder}/store"
    dist.init_process_group("gloo", start, _DEADLINE, world_size=world, rank=rank)
    for name in names:
        module, _, test = name.partition(":")
        try:
            getattr(importlib.import_module(module), test).body()
        except BaseException:  # as torch's CheckpointException is
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(failures))
    dist.destroy_process_group()


def same_on_all_ranks(*values: Any) -> None:
    """Assert that all ranks have the same values, bit for bit."""
    mine = pickle.dumps([v.tolist() if isinstance(v, torch.Tensor) else v for v in values])
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    assert all(other == mine for other in all_of_them)
