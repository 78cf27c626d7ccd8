"""``purprune prune``: a pruned checkpoint on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.cli import rules
from purprune_adapters.cli.output import AsJson, Command, human, is_terminal, say, say_json
from purprune_adapters.pruned_files import Progress, PrunedCheckpoint, prune_checkpoint

_EXAMPLES = (
    "Examples:\n\n"
    "purprune prune model.safetensors pruned.safetensors --sparsity 0.5\n\n"
    "purprune prune llama/ llama-2-4/ --nm 2:4 --leave model.embed_tokens --leave lm_head\n\n"
    "purprune prune llama/ out/ --sparsity 0.6 --scope global --masks masks.safetensors"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("prune", cls=Command, epilog=_EXAMPLES)(prune_command)


def prune_command(
    checkpoint: rules.CheckpointPath,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors file for a file, else a folder.")
    ],
    config: rules.ConfigFile = None,
    sparsity: rules.Sparsity = None,
    nm: rules.Nm = None,
    block: rules.BlockShape = None,
    channel: rules.ChannelDim = None,
    dim: rules.Dim = None,
    scope: rules.ScopeOption = None,
    leave: rules.Leave = None,
    step: rules.Step = None,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", metavar="FILE", help="Write the masks too, at a bit per entry."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run left.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned checkpoint: same files, names, dtypes; resumed where it was interrupted.

    OUT is whole or absent: it is made in a hidden folder beside it. Run the same command again
    after an interruption, and it goes on.
    """
    cfg = rules.config_of(config, sparsity, nm, block, channel, dim, scope, leave)
    with rules.selecting(leave), _bar(checkpoint) as progress:
        pruned = prune_checkpoint(
            checkpoint, out, cfg, step=step, masks=masks, overwrite=overwrite, restart=restart,
            progress=progress,
        )  # fmt: skip
    if as_json:
        say_json(pruned.as_dict())
    else:
        say(_text(pruned))


def _text(pruned: PrunedCheckpoint) -> str:
    lines = [
        f"{pruned.path}: {human(pruned.bytes)}, {pruned.total} zero in "
        f"{len(pruned.tensors)} pruned tensors"
    ]
    if pruned.resumed:
        lines.append(f"{pruned.resumed} files were whole from an interrupted run")
    if pruned.left_out:
        lines.append(f"not copied, since they hold weights: {', '.join(pruned.left_out)}")
    return "\n".join(lines)


@contextmanager
def _bar(checkpoint: Path) -> Iterator[Progress | None]:
    """Show bytes written and per second on stderr, where that is a terminal."""
    if not is_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    total = sum(like.nbytes for like in Checkpoint(checkpoint).shapes().values())
    columns = (TextColumn("{task.description:<8}"), BarColumn(), DownloadColumn(),
               TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        counting = bar.add_task("counting", total=None)
        writing = bar.add_task("writing", total=total)

        def progress(what: str, size: int) -> None:
            bar.update(counting if what == "read" else writing, advance=size)

        yield progress
