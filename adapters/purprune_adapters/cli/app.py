"""The commands in one application, and how errors become one line."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import purprune
from purprune_adapters.cli import (
    configs,
    demo,
    inspecting,
    planning,
    pruning,
    schedules,
    verifying,
)
from purprune_adapters.cli.output import one_line
from purprune_adapters.coreml.errors import ExportError

app = typer.Typer(
    name="purprune",
    help="Pruning for PyTorch: plan, prune, inspect and verify checkpoints, exactly.",
    epilog="Exit codes: 0, 1 when something did not hold, 2 for bad input. "
    "purprune --install-completion teaches the shell.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (planning, pruning, inspecting, schedules, verifying, configs, demo):
    module.register(app)

_TOLD = (
    ValueError, TypeError, LookupError, OSError, ImportError, ExportError, typer.TyperException,
)  # fmt: skip


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"purprune {purprune.__version__} (torch {torch.__version__}, Python "
            f"{platform.python_version()})"
        )
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Take what stands before the command."""


def _help(error: BaseException, argv: Sequence[str]) -> str:
    """Return where the options are listed, after an error that is about one."""
    if not isinstance(error, typer.TyperException):
        return ""
    named = next((word for word in argv if not word.startswith("-")), "")
    known = named if any(named == command.name for command in app.registered_commands) else ""
    return f" See: {' '.join(filter(None, ['purprune', known, '--help']))}"


def run(argv: Sequence[str]) -> int:
    """Run the application; return the exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=list(argv) or ["--help"], prog_name="purprune", standalone_mode=False
        )
    except _TOLD as error:
        if "--traceback" in argv:
            raise
        print(f"purprune: {one_line(error)}{_help(error, argv)}", file=sys.stderr)  # noqa: T201
        return 1 if isinstance(error, ExportError) else 2
    except typer.Abort:
        return 130
    return int(code or 0)
