"""The zeros of a checkpoint or a package as a page: the table of ``purprune inspect``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from purprune import Count
from purprune_adapters.html_report.template import render
from purprune_adapters.places import check_folder
from purprune_adapters.structure import Structure


def check_page(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path of a page that may be written.

    Raises:
        ValueError: it does not end in .html.
        FileExistsError: something is there, and ``overwrite`` is False or it is no file.
        FileNotFoundError, PermissionError: there is no such folder, or it is read-only.
    """
    file = check_folder(path)
    if file.suffix != ".html":
        raise ValueError(
            f"Expected a page that ends in .html; got '{file}'. Write "
            f"'{file.with_suffix('.html')}'."
        )
    if os.path.lexists(file) and not (overwrite and file.is_file()):
        raise FileExistsError(
            f"Expected nothing at '{file}'; something is there. Choose another place, or replace a "
            f"page with overwrite=True (--overwrite)."
        )
    return file


def write_inspected(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[Structure, str]],
    *,
    title: str,
    overwrite: bool = False,
) -> Path:
    """Write what tensors hold, and how each is stored, as one HTML file; return its path.

    Raises:
        ValueError, OSError: as :func:`check_page`.
    """
    file = check_page(path, overwrite=overwrite)
    counts = [found.count for found, _ in rows]
    total = Count(sum(c.zeros for c in counts), sum(c.entries for c in counts))
    page = render("inspected.html", title=title, rows=rows, total=total)
    file.write_text(page, encoding="utf-8")
    return file
