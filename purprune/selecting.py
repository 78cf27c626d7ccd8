"""Selecting the first k on the CPU, at about the speed of reading the scores.

Fresh memory pages cost more than arithmetic, so keys are made in chunks that stay in the cache, in
scratch that is used again. Three ways, by the size of a group:

- up to 16 units (N:M): every unit counts how many of its group stand before it, by comparing the
  keys with themselves shifted by 1 to m - 1;
- rows: a partition finds the k-th of each row. Keys of up to 32 bits get their index as lower bits:
  that is the order itself, and a partition is slow where many keys are equal;
- one large group: a sorted sample brackets the k-th key. One pass writes the mask above the
  bracket and collects the few keys inside; only these are ranked. A sample that misleads costs
  another pass and no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from purprune.bracketing import keep_all_but_lowest_of_one_group
from purprune.keys import Bools, KeyMaker, Keys
from purprune.threads import in_threads

_CHUNK = 1 << 19
"""Keys that are made at a time: 2 MB of them, so that calls are few and scratch stays cached."""
_SMALL_GROUP = 16
_BRACKET_FROM = 1 << 15
"""From this many keys on a bracket pays, and where keys are tied by far."""


class Span(NamedTuple):
    """Of the columns from start to stop, every ``size`` are a group, of which k go."""

    start: int
    stop: int
    size: int
    k: int


def keep_all_but_lowest(
    bits: Keys, keep: Bools, prev: Bools | None, lead: int, spans: Sequence[Span], make: KeyMaker
) -> None:
    """Write to ``keep`` which units stay: all but the first k of each group by (key, index).

    Args:
        bits: scores read as integers; the first ``lead`` dims index rows, no group crosses them.
        keep: the result, of the same shape; may be a view with any strides.
        prev: the result so far, or None. What it does not keep goes first.
        lead: 0 means one row, in which ``bits`` and ``keep`` are contiguous.
        spans: how the columns of a row divide into groups.
        make: how bits become keys.

    Raises:
        NotANumberError: a score is NaN.
    """
    if lead == 0:
        bits, keep = bits.reshape(1, -1), keep.reshape(1, -1)
        prev = None if prev is None else prev.reshape(1, -1)
        lead = 1
        if len(spans) == 1 and spans[0].size == bits.size >= _BRACKET_FROM:
            one = None if prev is None else prev[0]
            return keep_all_but_lowest_of_one_group(bits[0], keep[0], one, spans[0].k, make)
    at = max(range(lead), key=bits.shape.__getitem__)
    rows = max(1, _CHUNK * bits.shape[at] // max(bits.size, 1))

    def select(starts: Sequence[int]) -> None:
        for start in starts:
            part = (slice(None),) * at + (slice(start, start + rows),)
            _select_rows(
                bits[part], keep[part], None if prev is None else prev[part], lead, spans, make
            )

    in_threads(select, range(0, bits.shape[at], rows))
    return None


def _select_rows(
    bits: Keys, keep: Bools, prev: Bools | None, lead: int, spans: Sequence[Span], make: KeyMaker
) -> None:
    keys = make(bits, np.empty(bits.shape, bits.dtype))
    shape = (math.prod(bits.shape[:lead]), math.prod(bits.shape[lead:]))
    keys = keys.reshape(shape)
    kept = None if prev is None else prev.reshape(shape)
    stay = np.empty(shape, dtype=np.bool_)
    for start, stop, size, k in spans:
        part = keys[:, start:stop].reshape(-1, size)
        if kept is not None:
            part = _pruned_first(part, kept[:, start:stop].reshape(-1, size), k, make)
        stay[:, start:stop] = _all_but_lowest(part, k).reshape(shape[0], stop - start)
    keep[...] = stay.reshape(keep.shape)


def _pruned_first(keys: Keys, kept: Bools, k: int, make: KeyMaker) -> Keys:
    """Put what is pruned below all others; where more than k are, put the others above them."""
    if make.has_sign_free:
        return make.put_first(keys, kept)
    info = np.iinfo(keys.dtype)
    fit = np.count_nonzero(kept, axis=1, keepdims=True) >= keys.shape[1] - k
    if fit.all():
        return make.put_first(keys, kept)
    below = np.where(~kept & fit, keys.dtype.type(info.min), keys)
    return np.where(kept & ~fit, keys.dtype.type(info.max), below)


def _all_but_lowest(keys: Keys, k: int) -> Bools:
    """Mark all but the first k of each row by (key, index)."""
    size = keys.shape[1]
    if k <= 0 or k >= size or keys.size == 0:
        return np.full(keys.shape, k <= 0)
    return _by_shifts(keys, k) if size <= _SMALL_GROUP else _by_partition(keys, k)


@lru_cache(maxsize=32)
def _has_right(m: int, shift: int, at_least: int) -> Bools:
    """Mark the units that have one of their own group ``shift`` places to the right."""
    return np.tile(np.arange(m) < m - shift, at_least // m + 2)


def _by_shifts(keys: Keys, k: int) -> Bools:
    """Count for each unit how many of its group stand before it; of a tie the left one does."""
    m, units = keys.shape[1], keys.size
    if units > _CHUNK + m:  # so that patterns of one length serve all
        rows = max(1, _CHUNK // m)
        parts = [_by_shifts(keys[i : i + rows], k) for i in range(0, len(keys), rows)]
        return np.concatenate(parts)
    flat, ahead = keys.reshape(-1), np.zeros(units, dtype=np.uint8)
    for shift in range(1, m):
        own = _has_right(m, shift, _CHUNK)[: units - shift]
        left_first = flat[:-shift] <= flat[shift:]
        ahead[:-shift] += (own > left_first).view(np.uint8)  # the right one stands before
        left_first &= own
        ahead[shift:] += left_first.view(np.uint8)
    return (ahead >= k).reshape(keys.shape)


def _by_partition(keys: Keys, k: int) -> Bools:
    """Keep what stands behind the k-th of its row."""
    if keys.itemsize > 4:
        return _by_partition_and_ties(keys, k)
    ranked = np.left_shift(keys, 32, dtype=np.int64)
    ranked |= np.arange(keys.shape[1])
    ordered = ranked.copy()
    ordered.partition(k - 1, axis=1)
    behind: Bools = ranked > ordered[:, k - 1 : k]
    return behind


def _by_partition_and_ties(keys: Keys, k: int) -> Bools:
    """Keep what is above the k-th key of its row, and of the ties with it the last ones."""
    ordered = keys.copy()
    ordered.partition(k - 1, axis=1)
    threshold = ordered[:, k - 1 : k]
    keep: Bools = keys > threshold
    surplus = keys.shape[1] - k - np.count_nonzero(keep, axis=1)
    if rows := np.flatnonzero(surplus).tolist():
        ties = keys[rows] == threshold[rows]
        from_right = np.cumsum(ties[:, ::-1], axis=1, dtype=np.int64)[:, ::-1]
        keep[rows] |= ties & (from_right <= surplus[rows, None])
    return keep
