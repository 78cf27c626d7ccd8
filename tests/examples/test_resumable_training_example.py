"""The resumable training survives kills at any moment, with the bits of a run without them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from lives import MOMENTS, live

FOLDERS = (str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Make new processes quickly: they are forked from one that has imported all, and run nothing.

    What dies with a life is the memory of its training.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lives"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")]))
        yield context


@pytest.mark.parametrize(
    ("steps", "kills"),
    [(150, 10), pytest.param(3500, 150, marks=pytest.mark.slow)],
    ids=["10 kills", "150 kills"],
)
def test_a_run_that_is_killed_ends_with_the_bits_of_the_run_that_never_stopped(
    steps: int, kills: int, processes: ForkServerContext, bands: Path, tmp_path: Path
):
    """Defends law 10 against SIGKILL at any moment, within the writing of a checkpoint too."""

    def start(folder: Path, moment: str | None = None, nth: int = 0) -> ForkServerProcess:
        process = processes.Process(target=live, args=(folder, bands, steps, moment, nth))
        process.start()
        return process

    def end(process: ForkServerProcess) -> int | None:
        process.join(timeout=300)
        return process.exitcode

    draw, folder = random.Random(0), tmp_path / "killed"
    whole = start(tmp_path / "whole")
    survived = aside = 0
    for i in range(kills):  # every third life ends within a checkpoint, the others anywhere
        if i % 3:
            process = start(folder)
            time.sleep(draw.uniform(0, 0.15))
            process.kill()
            survived += end(process) == -signal.SIGKILL
        else:
            moment = MOMENTS[i // 3 % 3]
            assert end(start(folder, moment, draw.randint(1, 4))) == -signal.SIGKILL
            assert (folder / "checkpoint.partial").exists() is (moment != "after")
            survived += 1
        aside += (folder / "checkpoint.partial").exists()
    assert not (folder / "printed").exists(), "all of this happened before the end"
    assert end(start(folder)) == 0, (folder / "errors").read_text()
    assert end(whole) == 0, (tmp_path / "whole" / "errors").read_text()
    lives = (folder / "errors").read_text().splitlines()
    print(f"{survived} kills, {aside} with a file aside, {len(lives)} lives that trained")
    assert survived == kills
    assert "digest: " in (folder / "printed").read_text()
    assert (folder / "printed").read_text() == (tmp_path / "whole" / "printed").read_text()
