"""The errors of purprune, and the texts that lead out of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence, Set
from typing import Any

from pydantic import ValidationError


class ConfigError(ValueError):
    """A schedule, pattern, score, rule or config was built from impossible values."""


class SelectionError(ConfigError):
    """A config and a set of parameters do not fit: a selector matches nothing, or too much."""


class NaNError(ValueError):
    """A weight, gradient or score holds NaN, which has no rank."""


def near_misses(word: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Return `` Did you mean 'a' or 'b'?``, or an empty text when nothing is near."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=limit, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: ValidationError, title: str, fields: Sequence[str], known: Set[str]) -> str:
    """Put what pydantic found into one clear line for each finding.

    Args:
        error: what pydantic raised.
        title: the name of the value that was built.
        fields: its fields in order; a finding about argument 0 is about the first.
        known: every key that purprune knows anywhere, for near misses.
    """
    return "\n".join(_finding(dict(e), title, fields, known) for e in error.errors())


def _finding(found: dict[str, Any], title: str, fields: Sequence[str], known: Set[str]) -> str:
    first, *rest = found["loc"] or ("",)
    if isinstance(first, int) and first < len(fields):
        first = fields[first]
    path = ".".join(str(part) for part in (title, first, *rest) if part not in {"", "[key]"})
    kind = found["type"]
    if kind in {"value_error", "assertion_error"}:
        return f"{path}: {found['ctx']['error']}"
    if kind == "unexpected_positional_argument":
        return f"{title}: expected at most {len(fields)} values; got more."
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        key = str(found["loc"][-1])
        there = f" Known here: {', '.join(fields)}." if not rest else ""
        return f"{path}: unknown key {key!r}.{near_misses(key, known - {key}) or there}"
    if kind in {"missing", "missing_argument"}:
        return f"{path}: expected a value; got none."
    message = found["msg"].replace("Input should be ", "expected ")
    return f"{path}: {message}; got {found['input']!r}."
