"""Selecting the first k on the CPU, at about the speed of reading the scores.

Fresh memory pages cost more than arithmetic, so keys are made in chunks that stay in the cache, in
scratch that is used again. Three ways, by the size of a group:

- up to 16 units (N:M): every unit counts how many of its group stand before it, by comparing the
  keys with themselves shifted by 1 to m - 1;
- rows and small tensors: a partition finds the k-th key of each. Where many keys are equal it is
  slow, and there, as where it costs nothing, keys get their index as lower bits. In a group of its
  own what was pruned before takes no part: those are zeros, and equal;
- one large group: a sample brackets the k-th key (:mod:`purprune.bracketing`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from purprune.bracketing import keep_all_but_lowest_of_one_group, those_that_take_part
from purprune.keys import Bools, KeyMaker, Keys
from purprune.scratch import scratch
from purprune.threads import in_threads

_CHUNK = 1 << 19
"""Keys that are made at a time, so that calls are few and scratch stays in the cache."""
SMALL_GROUP = 16
"""Of so many units each counts how many of its group stand before it, on every device."""
_BRACKET_FROM = {2: (1 << 16) + 1, 4: 1 << 19, 8: 1 << 19}
"""From so many keys of so many bytes on a bracket pays; pairs of 16 bits are the faster way."""
_TIES_MATTER_FROM = 1 << 12
"""Keys; with fewer a partition that goes astray costs less than to look."""
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64} if sys.byteorder == "little" else {}
"""The words in which groups of so many units count at once, a byte for each."""


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
        if len(spans) == 1 and spans[0].size == bits.size >= _BRACKET_FROM[bits.itemsize]:
            one = None if prev is None else prev[0]
            return keep_all_but_lowest_of_one_group(bits[0], keep[0], one, spans[0].k, make)
    if bits.size <= _CHUNK:
        return _select_rows(bits, keep, prev, lead, spans, make)
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
    if bits.size == 0:
        return
    shape = (math.prod(bits.shape[:lead]), math.prod(bits.shape[lead:]))
    kept, stay = None if prev is None else prev.reshape(shape), []
    with scratch(bits.size, bits.dtype) as memory:
        keys = make(bits, memory.reshape(bits.shape)).reshape(shape)
        for start, stop, size, k in spans:
            part = keys[:, start:stop].reshape(-1, size)
            before = None if kept is None else kept[:, start:stop].reshape(-1, size)
            if before is None:
                found = _all_but_lowest(part, k)
            elif len(part) == 1:
                found = _of_those_that_take_part(part, before, k)
            else:
                found = _all_but_lowest(_pruned_first(part, before, k, make), k)
            stay.append(found.reshape(shape[0], stop - start))
    whole = np.concatenate(stay, axis=1) if len(stay) > 1 else stay[0]
    keep[...] = whole.reshape(keep.shape)


def _of_those_that_take_part(keys: Keys, kept: Bools, k: int) -> Bools:
    """Rank in one group what is kept so far; where fewer may go than went, what went.

    Pruned weights are zeros, and so many ties are what a partition is slow at.
    """
    among, others_stay, _, go = those_that_take_part(kept.reshape(-1), k)
    where = np.flatnonzero(among)  # four times as fast as to index by bools
    stay = np.full(keys.shape, others_stay)
    stay.reshape(-1)[where] = _all_but_lowest(keys.reshape(-1)[where].reshape(1, -1), go)
    return stay


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
    if size > SMALL_GROUP or len(keys) == 1:
        return _by_partition(keys, k)
    if keys.size > _CHUNK + size:  # so that patterns of one length serve all
        rows = max(1, _CHUNK // size)
        parts = [_all_but_lowest(keys[i : i + rows], k) for i in range(0, len(keys), rows)]
        return np.concatenate(parts)
    return _by_words(keys, k) if size in _WORDS else _by_shifts(keys, k)


def _by_words(keys: Keys, k: int) -> Bools:
    """Count for each unit how many of its group stand before it, all of a group in one word.

    The unit d places to the right of unit j stands before it or behind it: where not behind, byte
    j of the group's word grows by 1, else byte j + d does. So with 1 in byte j where it is behind,
    and 0 in the bytes without such a neighbour, the counts are ``m - 1 - j`` in byte j, plus the
    word times ``256**d - 1`` for each d.
    """
    m, flat = keys.shape[1], keys.reshape(-1)
    word: Any = _WORDS[m]
    counts = np.full(len(keys), _bytes(range(m)[::-1]), word)
    behind = np.zeros(flat.size, np.bool_)
    words = behind.view(word)
    for d in range(1, m):
        np.less_equal(flat[:-d], flat[d:], out=behind[:-d])  # of a tie the left one goes first
        np.bitwise_and(words, word(_bytes([1] * (m - d))), out=words)
        np.multiply(words, word(256**d - 1), out=words)
        np.add(counts, words, out=counts)
    keep: Bools = counts.view(np.uint8) >= k
    return keep.reshape(keys.shape)


def _bytes(values: Sequence[int]) -> int:
    return int.from_bytes(bytes(values), "little")


@lru_cache(maxsize=32)
def _has_right(m: int, shift: int, at_least: int) -> Bools:
    """Mark the units that have one of their own group ``shift`` places to the right."""
    return np.tile(np.arange(m) < m - shift, at_least // m + 2)


def _by_shifts(keys: Keys, k: int) -> Bools:
    """Count for each unit how many of its group stand before it; of a tie the left one does."""
    m, units = keys.shape[1], keys.size
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
    if keys.itemsize == 2 and keys.shape[1] <= 1 << 16:
        return _by_pairs(keys, k, np.dtype(np.int32))
    if keys.itemsize <= 4 and _are_tied(keys):
        return _by_pairs(keys, k, np.dtype(np.int64))
    return _by_threshold(keys, k)


def _are_tied(keys: Keys) -> bool:
    """Tell whether a quarter of the keys may be equal, at which a partition goes astray."""
    if keys.size < _TIES_MATTER_FROM:
        return False
    few = np.sort(keys.reshape(-1)[:: keys.size // 64])
    return bool((few[16:] == few[:-16]).any())


def _by_pairs(keys: Keys, k: int, wide: np.dtype[np.signedinteger[Any]]) -> Bools:
    """Partition pairs of key and index: no two are equal, and their order is the order."""
    with scratch(keys.size, wide) as memory, scratch(keys.size, wide) as other:
        pairs, ordered = memory.reshape(keys.shape), other.reshape(keys.shape)
        np.left_shift(keys, 4 * wide.itemsize, out=pairs, dtype=wide)
        pairs |= np.arange(keys.shape[1], dtype=wide)
        np.copyto(ordered, pairs)
        ordered.partition(k - 1, axis=1)
        behind: Bools = pairs > ordered[:, k - 1 : k]
        return behind


def _by_threshold(keys: Keys, k: int) -> Bools:
    """Keep what is above the k-th key of its row, and of the ties with it the last ones."""
    wide = np.int32 if keys.itemsize == 2 else keys.dtype  # of 16 bits a partition is slow
    with scratch(keys.size, wide) as memory:
        ordered = memory.reshape(keys.shape)
        np.copyto(ordered, keys)
        ordered.partition(k - 1, axis=1)
        threshold = ordered[:, k - 1 : k].astype(keys.dtype)
    keep: Bools = keys > threshold
    left = keys.shape[1] - k
    if np.count_nonzero(keep) < len(keys) * left:
        _keep_last_ties(keep, keys, threshold, left)
    return keep


def _keep_last_ties(keep: Bools, keys: Keys, threshold: Keys, left: int) -> None:
    """Keep the last of the ties with the threshold, so that so many are left in each row."""
    surplus = left - np.count_nonzero(keep, axis=1)
    rows = np.flatnonzero(surplus)
    ties = keys[rows] == threshold[rows]
    wide = np.int32 if keys.shape[1] < 1 << 31 else np.int64
    from_right = np.cumsum(ties[:, ::-1], axis=1, dtype=wide)[:, ::-1]
    keep[rows] |= ties & (from_right <= surplus[rows, None])
