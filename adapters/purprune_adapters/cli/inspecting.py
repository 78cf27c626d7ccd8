"""``purprune inspect``: the zeros of a checkpoint or a package, and their structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from purprune import Count
from purprune_adapters.cli.output import AsJson, Command, say, say_json, table
from purprune_adapters.html_report.inspected import check_page, write_inspected
from purprune_adapters.structure import Structure, structure_of
from purprune_adapters.weights import iter_weights

_EXAMPLES = (
    "Examples:\n\n"
    "purprune inspect llama-2-4/\n\n"
    "purprune inspect model.pt --json\n\n"
    "purprune inspect net.mlpackage --html net.html"
)


class Inspected(NamedTuple):
    """A tensor, and how it is stored."""

    structure: Structure
    stored: str


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect", cls=Command, epilog=_EXAMPLES)(inspect_command)


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A checkpoint in safetensors or of torch.save, or an .mlpackage."
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the table as one HTML page too."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a page that is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count zeros, and name the structure they have: channels, blocks, N:M (first number zeros)."""
    if html is not None:
        check_page(html, overwrite=overwrite)
    found = inspected(path)
    if html is not None:
        write_inspected(html, found, title=f"Zeros of {path.resolve().name}", overwrite=overwrite)
    if as_json:
        say_json(as_dict(found))
    else:
        say(_text(found))


def inspected(path: Path) -> list[Inspected]:
    """Return what every floating-point tensor holds; one at a time is in memory."""
    found = [Inspected(structure_of(name, t), stored) for name, t, stored in iter_weights(path)]
    if not found:
        raise ValueError(f"Expected floating-point tensors in '{path}'; there are none.")
    return found


def as_dict(found: Sequence[Inspected]) -> dict[str, object]:
    """Return plain values."""
    total = _total(found)
    return {
        "tensors": [{**one.structure.as_dict(), "stored": one.stored} for one in found],
        "zeros": total.zeros,
        "entries": total.entries,
        "sparsity": float(total),
    }


def _total(found: Sequence[Inspected]) -> Count:
    counts = [one.structure.count for one in found]
    return Count(sum(c.zeros for c in counts), sum(c.entries for c in counts))


def _text(found: Sequence[Inspected]) -> str:
    head = ("tensor", "shape", "dtype", "stored", "zeros", "density", "structure")
    rows = [
        (
            one.name,
            "x".join(map(str, one.shape)),
            one.dtype,
            stored,
            f"{one.count.zeros:,} of {one.count.entries:,}",
            f"{1 - float(one.count):.4f}",
            str(one) or "-",
        )
        for one, stored in found
    ]
    return f"{table(head, rows)}\n\nzeros: {_total(found)}"
