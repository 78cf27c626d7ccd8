"""What commands print: a table for people, JSON for machines, an error in one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from purprune import ConfigError
from purprune.tables import text_table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


class Command(TyperCommand):
    """A command whose help shows no type for flags, which take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


def say(text: str) -> None:
    """Print a text on stdout."""
    typer.echo(text)


def say_json(found: Mapping[str, Any]) -> None:
    """Print JSON on stdout; no NaN, which JSON does not know."""
    typer.echo(json.dumps(found, indent=2, allow_nan=False, default=_plain))


def _plain(item: Any) -> Any:
    if isinstance(item, Path):
        return str(item)
    raise TypeError(f"Expected a value that JSON has; got {type(item).__name__}.")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a text table."""
    return text_table(head, rows)


def human(size: int) -> str:
    """Return bytes for people.

    >>> human(10_240_000_000), human(999)
    ('10.24 GB', '999 B')
    """
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= power:
            return f"{size / power:.2f} {unit}"
    return f"{size} B"


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line."""
    if isinstance(error, typer.TyperException):
        text = error.format_message()
    elif isinstance(error, KeyError):  # whose str is the repr of its text
        text = str(error.args[0]) if error.args else "KeyError"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


@contextmanager
def in_words_of(option: str = "", fields: Mapping[str, str] | None = None) -> Iterator[None]:
    """Tell errors of values in the words that were typed: those of options.

    Args:
        option: what was typed; it takes the place of the value's name.
        fields: the options that stand for the value's fields.
    """
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"^\w+(: |\.)", "", str(error))
        for field, typed in (fields or {}).items():
            text = re.sub(rf"\b(?<!-){field}\b", typed, text)
        text = f"{option}: {text}" if option else text[:1].upper() + text[1:]
        raise ConfigError(text) from None


def is_terminal() -> bool:
    """Tell whether progress is seen by somebody."""
    return sys.stderr.isatty()
