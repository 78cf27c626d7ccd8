"""The errors of purprune, and the near misses that they name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
