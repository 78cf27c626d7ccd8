"""``purprune`` on the command line; typer is imported when :func:`main` is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 for what did not hold, or 2 for bad input.

    Bad input is answered by one line on stderr: what was expected, what came, and the way out.
    ``--traceback`` before the command shows where it was raised.
    """
    try:
        from purprune_adapters.cli.app import run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(  # noqa: T201
            "purprune: Expected typer for the command line; it is not there. Install it with "
            "pip install 'purprune[cli]'.",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:] if argv is None else list(argv))
