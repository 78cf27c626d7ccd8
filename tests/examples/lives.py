"""One life of the resumable training in a process of its own, and the moments at which it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer step imports it; here all lives share it

import resumable_training as example

MOMENTS = ("half", "before", "after")
"""Within a checkpoint: half of it is written, all of it but not moved, or it was just moved."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_checkpoint(moment: str, nth: int) -> None:
    """Let the process kill itself at a moment of the nth checkpoint that it writes."""
    save, move, saves = torch.save, Path.replace, 0

    def save_or_die(states: Any, file: Any) -> None:
        nonlocal saves
        saves += 1
        if (saves, moment) == (nth, "half"):
            whole = io.BytesIO()
            save(states, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        save(states, file)

    def move_or_die(self: Path, target: Path) -> None:
        if (saves, moment) == (nth, "before"):
            die()
        move(self, target)
        if (saves, moment) == (nth, "after"):
            die()

    torch.save, Path.replace = save_or_die, move_or_die


def live(folder: Path, data: Path, steps: int, moment: str | None, nth: int) -> None:
    """Train until the end, and write what it prints to ``folder / "printed"``; or die before."""
    folder.mkdir(exist_ok=True)
    sys.stderr = (folder / "errors").open("a")
    if moment is not None:
        die_within_a_checkpoint(moment, nth)
    arguments = [str(folder), "--data", str(data), "--steps", str(steps), "--save-every", "1"]
    with redirect_stdout(io.StringIO()) as printed:
        example.main(arguments)
    (folder / "printed").write_text(printed.getvalue())
