"""Text tables for people; rich is imported when a table is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain text table: the first column to the left, the others to the right."""
    from rich.box import ASCII
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII, show_edge=False, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=10_000, no_color=True, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def skipped_text(skipped: Mapping[str, str]) -> str:
    """Return which parameters are not pruned, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    lines = [
        f"  {reason}: {', '.join(found[:4])}{f' and {len(found) - 4} more' if found[4:] else ''}"
        for reason, found in names.items()
    ]
    return "\n".join(["\nnot pruned:", *lines]) if lines else ""
