"""The resumable training survives kills at any moment, with the bits of a run without them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Kills itself within the nth checkpoint: with half of it written, before the move, or after it.
KILLER = """
import io, os, pathlib, signal, sys, torch
import resumable_training as example

moment, nth = sys.argv.pop(1), int(sys.argv.pop(1))
save, move, saves = torch.save, pathlib.Path.replace, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def torch_save(states, file):
    global saves
    saves += 1
    if saves == nth and moment == "half":
        save(states, whole := io.BytesIO())
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()
    save(states, file)

def replace(self, target):
    if saves == nth and moment == "before":
        die()
    move(self, target)
    if saves == nth and moment == "after":
        die()

torch.save, pathlib.Path.replace = torch_save, replace
example.main(sys.argv[1:])
"""


def start(data: Path, folder: Path, steps: int, *killer: str) -> subprocess.Popen[str]:
    script = ["-c", KILLER, *killer] if killer else [str(EXAMPLES / "resumable_training.py")]
    arguments = [str(folder), "--data", str(data), "--steps", str(steps), "--save-every", "1"]
    paths = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", *script, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def killed_at_a_random_moment(process: subprocess.Popen[str], delay: float) -> bool:
    """Wait until it trains, kill it a little later; return whether it was still training."""
    assert process.stderr is not None
    assert process.stderr.readline().startswith("training from step")
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=300)
    return process.returncode == -signal.SIGKILL


def killed_within_a_checkpoint(process: subprocess.Popen[str], moment: str, folder: Path) -> bool:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    return (folder / "checkpoint.partial").exists() is (moment != "after")


MOMENTS = ("half", "before", "after")


@pytest.mark.parametrize(
    ("steps", "kills"),
    [(40, ("half", 0.1)), pytest.param(1500, None, marks=pytest.mark.slow)],
    ids=["a few kills", "24 kills"],
)
def test_a_run_that_is_killed_ends_with_the_bits_of_the_run_that_never_stopped(
    steps: int, kills: tuple[str | float, ...] | None, bands: Path, tmp_path: Path
):
    """Defends law 10 against SIGKILL at any moment, within the writing of a checkpoint too."""
    draw = random.Random(0)
    if kills is None:  # of three lives two end at a random moment, and one within a checkpoint
        kills = tuple(draw.uniform(0, 0.4) if i % 3 else MOMENTS[i // 3 % 3] for i in range(24))
    whole = start(bands, tmp_path / "whole", steps)
    survived = half_written = 0
    for kill in kills:
        if isinstance(kill, str):
            nth = str(draw.randint(2, 6))
            process = start(bands, tmp_path / "killed", steps, kill, nth)
            assert killed_within_a_checkpoint(process, kill, tmp_path / "killed")
            survived += 1
        else:
            process = start(bands, tmp_path / "killed", steps)
            survived += killed_at_a_random_moment(process, kill)
        half_written += (tmp_path / "killed" / "checkpoint.partial").exists()
    printed = end(start(bands, tmp_path / "killed", steps))
    print(f"{survived} kills of {len(kills)}, {half_written} with a file aside")
    assert survived >= len(kills) * 5 // 6
    assert half_written >= 1
    assert "digest: " in printed
    assert printed == end(whole)
