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
    """Return `` Did you mean 'a' or 'b'?``, or an empty text when nothing is near.

    >>> near_misses("ios17", ["iOS16", "iOS17", "macOS13"])
    " Did you mean 'iOS17'?"
    """
    known = list(dict.fromkeys(candidates))
    same = [name for name in known if name.lower() == word.lower()]
    close = same or difflib.get_close_matches(word, known, n=limit, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


_ALIASES = dict.fromkeys(("amount", "sparsity", "target"), "target_sparsity")
"""What keys are called elsewhere."""

_EXAMPLES = {"Rule": "Rule(0.5)", "Pattern": "Channel() or NM(2, 4)"}
"""Values that are often forgotten around what they hold."""


def one_line(
    error: ValidationError,
    title: str,
    fields: Sequence[str],
    known: Set[str],
    by_name: Sequence[str] = (),
) -> str:
    """Put what pydantic found into one clear line for each finding.

    Args:
        error: what pydantic raised.
        title: the name of the value that was built.
        fields: its fields in order; a finding about argument 0 is about the first.
        known: every key that purprune knows anywhere, for near misses.
        by_name: fields that are no arguments in order.
    """
    found = [dict(e) for e in error.errors()]
    if any(e["type"] == "unexpected_positional_argument" for e in found):
        return too_many(title, fields, by_name)  # what else was found is of values out of place
    return "\n".join(_finding(e, title, fields, known) for e in found)


def _finding(found: dict[str, Any], title: str, fields: Sequence[str], known: Set[str]) -> str:
    first, *rest = found["loc"] or ("",)
    if isinstance(first, int) and first < len(fields):
        first = fields[first]
    path = ".".join(str(part) for part in (title, first, *rest) if part not in {"", "[key]"})
    kind = found["type"]
    if kind in {"value_error", "assertion_error"}:
        return f"{path}: {found['ctx']['error']}"
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        key = str(found["loc"][-1])
        return f"{path}: unknown key {key!r}.{meant(key, () if rest else fields, known)}"
    if kind in {"missing", "missing_argument"}:
        return f"{path}: expected a value; got none."
    message, given = found["msg"].replace("Input should be ", "expected "), found["input"]
    if kind == "dataclass_type":
        name = found["ctx"]["class_name"]
        example = f" such as {_EXAMPLES[name]}" if name in _EXAMPLES else ""
        message = f"expected a {name}{example}, or a dict of its keys"
    if hasattr(given, "__name__"):  # a class, or a function that builds a value
        return f"{path}: {message}; got {given.__name__} itself. Write {given.__name__}(...)."
    return f"{path}: {message}; got {given!r}."


def meant(key: str, own: Iterable[str], known: Set[str]) -> str:
    """Return what may be meant: a key of this value, or else one of any other.

    Args:
        key: what was given.
        own: the keys of the value; none where it is not known which value it is.
        known: every key that purprune knows anywhere.
    """
    own = [name for name in own if name != "kind"]
    if _ALIASES.get(key) in (own or known):
        return f" Did you mean {_ALIASES[key]!r}?"
    others = known - {key, "kind"} if own else known - {key}
    near = near_misses(key, own) or near_misses(key, others)
    return near or (f" Known here: {', '.join(own)}." if own else "")


def too_many(title: str, fields: Sequence[str], by_name: Sequence[str]) -> str:
    """Say which values come in order, and how the others are written."""
    order = ", ".join(name for name in fields if name not in by_name)
    others = ", ".join(f"{name}=..." for name in by_name if name != "kind")
    expected = f"at most {order} without a name" if order else "no value without its name"
    way_out = f" Write the others so: {title}({others})." if others else ""
    return f"{title}: expected {expected}; got more.{way_out}"
