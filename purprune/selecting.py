"""Selecting the first k on the CPU, at about the speed of reading the scores.

Fresh memory pages cost more than arithmetic, so keys are made in chunks that stay in the cache, in
scratch that is used again. Three ways, by the size of a group:

- up to 16 units (N:M): every unit counts how many of its group stand before it, by comparing the
  keys with themselves shifted by 1 to m - 1;
- rows: a partition finds the k-th of each row. Keys of up to 32 bits get their index as lower bits:
  that is the order itself, and a partition is slow where many keys are equal;
- one large group: a sorted sample brackets the k-th key. One pass writes the mask above the
  bracket and collects the few keys inside; only these are partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purprune.threads import in_threads

Keys = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

_CHUNK = 1 << 19
"""Keys that are made at a time: 2 MB of them, so that calls are few and scratch stays cached."""
_SMALL_GROUP = 16
_BRACKET_FROM = 1 << 15
"""From this many keys on a bracket pays, and where keys are tied by far."""
_SAMPLE = 1 << 15
"""The sample is a 64th of the keys, but not larger than this."""
_GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 fall evenly: a sample without a stride that data could follow."""


class NotANumberError(Exception):
    """A score is NaN."""


class Span(NamedTuple):
    """Of the columns from start to stop, every ``size`` are a group, of which k go."""

    start: int
    stop: int
    size: int
    k: int


class KeyMaker(NamedTuple):
    """Turns bits of scores into keys that order alike, and finds NaN on the way."""

    absolute: bool
    infinity: int | None
    """The bits of infinity; None where the scores are integers."""

    def __call__(self, bits: Keys, out: Keys) -> Keys:
        """Write the keys of ``bits`` to ``out``; the extremes of its type never occur."""
        if self.infinity is None:
            np.copyto(out, bits)
            return np.absolute(out, out=out) if self.absolute else out
        info = np.iinfo(out.dtype)
        np.bitwise_and(bits, out.dtype.type(info.max), out=out)
        if out.size and out.max() > self.infinity:
            raise NotANumberError
        if not self.absolute:  # put the sign back, as a two's complement one
            sign = bits >> (info.bits - 1)
            np.bitwise_xor(out, sign, out=out)
            np.subtract(out, sign, out=out)
        return out

    @property
    def has_sign_free(self) -> bool:
        """Whether no key is negative, so that the sign can tell what was pruned before."""
        return self.absolute and self.infinity is not None

    def put_first(self, keys: Keys, kept: Bools) -> Keys:
        """Put what was not kept below all else; by the sign it stays in order among itself."""
        info, pruned = np.iinfo(keys.dtype), ~kept
        if self.has_sign_free:
            sign = np.left_shift(pruned.view(np.int8), info.bits - 1, dtype=keys.dtype)
            return np.bitwise_or(keys, sign, out=keys)
        np.copyto(keys, info.min, where=pruned)
        return keys


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
        whole = len(spans) == 1 and spans[0].size == bits.size >= _BRACKET_FROM
        if whole and _bracketed(bits[0], keep[0], prev, spans[0].k, make):
            return
    at = max(range(lead), key=bits.shape.__getitem__)
    rows = max(1, _CHUNK * bits.shape[at] // max(bits.size, 1))

    def select(starts: Sequence[int]) -> None:
        for start in starts:
            part = (slice(None),) * at + (slice(start, start + rows),)
            _select_rows(
                bits[part], keep[part], None if prev is None else prev[part], lead, spans, make
            )

    in_threads(select, range(0, bits.shape[at], rows))


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


def _bracketed(bits: Keys, keep: Bools, prev: Bools | None, k: int, make: KeyMaker) -> bool:
    """Select in one large group with one pass; False where the sample's bracket missed."""
    n = bits.size
    kept = None if prev is None else prev[0]
    left = n if kept is None else np.count_nonzero(kept)
    share = (k - (n - left)) / max(left, 1)  # of those that are not pruned yet
    if share < 0:
        return False
    if share in (0, 1):  # nothing to rank, but NaN to find
        for start in range(0, n, _CHUNK):
            make(bits[start : start + _CHUNK], np.empty(min(_CHUNK, n - start), bits.dtype))
        keep[...] = False if share else True if kept is None else kept
        return True
    low, high = _bracket(bits, kept, share, make)

    def scan(starts: Sequence[int]) -> list[tuple[Any, Any, Any]]:
        size = min(_CHUNK, n)
        keys, flags = np.empty(size, bits.dtype), np.empty(size, np.bool_)
        found: list[tuple[Any, Any, Any]] = []
        for start in starts:
            part = _chunk(bits, kept, start, make, keys)
            above = np.greater(part, high, out=keep[start : start + part.size])
            inside = np.greater_equal(part, low, out=flags[: part.size])
            np.not_equal(inside, above, out=inside)
            if low == high:  # all ties: where they are is asked for where they end
                found.append((np.count_nonzero(above), np.count_nonzero(inside), start))
            else:
                at = np.flatnonzero(inside)
                found.append((np.count_nonzero(above), part[at], at + start))
        return found

    starts = range(0, n, _CHUNK)
    found = [row for rows in in_threads(scan, starts) for row in rows]
    above_all = sum(row[0] for row in found)
    if low == high:
        need = k - (n - above_all - sum(row[1] for row in found))
        return need >= 0 and _keep_late_ties(bits, keep, kept, need, low, found, make)
    keys, at = (np.concatenate([row[i] for row in found]) for i in (1, 2))
    need = k - (n - above_all - keys.size)
    if not 0 <= need <= keys.size:
        return False
    keep[at[_all_but_lowest(keys.reshape(1, -1), need)[0]]] = True
    return True


def _chunk(bits: Keys, kept: Bools | None, start: int, make: KeyMaker, scratch: Keys) -> Keys:
    part = bits[start : start + _CHUNK]
    keys = make(part, scratch[: part.size])
    return keys if kept is None else make.put_first(keys, kept[start : start + _CHUNK])


def _bracket(bits: Keys, kept: Bools | None, share: float, make: KeyMaker) -> tuple[Any, Any]:
    """Return two keys with that share of the unpruned ones below, but for bad luck (4 sigma)."""
    size = min(max(bits.size // 64, 64), _SAMPLE)
    at = (np.arange(size) * _GOLDEN % 1.0 * bits.size).astype(np.int64)
    if kept is not None:
        at = at[kept[at]]
    sample = make(bits[at], np.empty(at.shape, bits.dtype))
    sample.sort()
    info = np.iinfo(sample.dtype)
    margin = 4 * math.sqrt(at.size * share * (1 - share)) + 4
    first, last = math.floor(share * at.size - margin), math.ceil(share * at.size + margin)
    lowest = 0 if make.absolute else info.min + 1  # above everything that is pruned already
    low = sample[first] if first >= 0 else sample.dtype.type(lowest)
    high = sample[last] if last < at.size else sample.dtype.type(info.max)
    return low, high


def _keep_late_ties(
    bits: Keys,
    keep: Bools,
    kept: Bools | None,
    need: int,
    tie: Any,
    found: Sequence[tuple[Any, Any, Any]],
    make: KeyMaker,
) -> bool:
    """Let the first ``need`` ties go and keep the others; False where there are not enough."""
    scratch = np.empty(_CHUNK, bits.dtype)
    for _, ties, start in found:
        if need >= ties:
            need -= ties
            continue
        keys = _chunk(bits, kept, start, make, scratch)
        keep[start + np.flatnonzero(keys == tie)[need:]] = True
        need = 0
    return need == 0
