"""One progress bar over the stages of an export."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["stages"]


def _silent(stage: str) -> None:
    del stage


@contextlib.contextmanager
def stages(show: bool | None, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; None shows it when stderr is a terminal.

    Yields:
        A function to call with the name of each stage as it begins.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # The streams are captured while coremltools works; this console keeps the real one.
    bar = Progress(
        TextColumn("export to Core ML: {task.description:<15}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("check", total=total)
        begun = 0

        def begin(stage: str) -> None:
            nonlocal begun
            bar.update(task, description=stage, completed=begun)
            begun += 1

        yield begin
        bar.update(task, description="done", completed=total)
