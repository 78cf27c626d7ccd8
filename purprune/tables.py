"""Text tables for people; rich is imported when a table is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
