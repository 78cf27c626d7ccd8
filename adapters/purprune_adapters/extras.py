"""Packages that are extras: imported where they are used, and named where they are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def install_hint(package: str, extra: str) -> str:
    """Return the text of the ImportError for a package that is missing."""
    return (
        f'Expected {package}, which is missing; install it with `pip install "purprune[{extra}]"`.'
    )


def data_frame(rows: Sequence[Mapping[str, Any]], index: str) -> Any:
    """Return a pandas.DataFrame of rows with one key as the index.

    Raises:
        ImportError: pandas is not installed; names the extra.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(install_hint("pandas", "pandas")) from error
    if not rows:
        return pandas.DataFrame(index=pandas.Index([], name=index))
    return pandas.DataFrame.from_records([dict(row) for row in rows]).set_index(index)
