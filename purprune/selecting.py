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
_SAMPLE = 8
"""Times the root of the number of keys is the size of the sample."""
_FEW_VALUES = 1 << 16
"""Between bounds as close as this values are counted instead of partitioned."""
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
        if len(spans) == 1 and spans[0].size == bits.size >= _BRACKET_FROM:
            one = None if prev is None else prev[0]
            return _one_group(bits[0], keep[0], one, spans[0].k, make)
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


class _Chunk(NamedTuple):
    """What one pass found in a chunk: how many are above the bracket, and what is inside."""

    start: int
    above: int
    inside: int
    keys: Keys | None = None
    at: NDArray[np.intp] | None = None


class _Contest(NamedTuple):
    """The ranking of one large group, in which only some units take part."""

    bits: Keys
    keep: Bools
    among: Bools | None
    """Which units take part; None: all."""
    others: bool
    """Whether the others stay."""
    k: int
    """How many of those that take part go."""
    make: KeyMaker

    def find(self, low: Any, high: Any) -> list[_Chunk]:
        """Decide what is above the bracket, and find what is inside, in one pass."""

        def scan(starts: Sequence[int]) -> list[_Chunk]:
            size = min(_CHUNK, self.bits.size)
            keys, flags = np.empty(size, self.bits.dtype), np.empty(size, np.bool_)
            return [self._scan(start, low, high, keys, flags) for start in starts]

        starts = range(0, self.bits.size, _CHUNK)
        return [chunk for run in in_threads(scan, starts) for chunk in run]

    def _scan(self, start: int, low: Any, high: Any, keys: Keys, flags: Bools) -> _Chunk:
        part = self.keys(start, keys)
        above = np.greater(part, high, out=self.keep[start : start + part.size])
        inside = np.greater_equal(part, low, out=flags[: part.size])
        np.not_equal(inside, above, out=inside)
        if self.among is not None:
            among = self.among[start : start + part.size]
            above &= among
            inside &= among
        found = int(np.count_nonzero(above))
        if self.among is not None and self.others:
            np.greater_equal(above, among, out=above)  # above, or one of the others
        if low == high:  # all ties: where they are is asked for where they end
            return _Chunk(start, found, int(np.count_nonzero(inside)))
        at = np.flatnonzero(inside)
        return _Chunk(start, found, at.size, part[at], at)

    def sample(self) -> Keys:
        """Return the sorted keys of a few units, spread evenly."""
        size = int(_SAMPLE * math.sqrt(self.bits.size))
        at = (np.arange(size) * _GOLDEN % 1.0 * self.bits.size).astype(np.int64)
        if self.among is not None:
            at = at[self.among[at]]
        keys = self.make(self.bits[at], np.empty(at.shape, self.bits.dtype))
        keys.sort()
        return keys

    def keys(self, start: int, scratch: Keys) -> Keys:
        """Return the keys of one chunk."""
        part = self.bits[start : start + _CHUNK]
        return self.make(part, scratch[: part.size])

    def settle(self, found: Sequence[_Chunk], need: int, low: Any, high: Any) -> None:
        """Keep what is inside, but for the first ``need`` by (key, index)."""
        tie, go = low, need
        if need and low < high:
            keys = np.concatenate([chunk.keys for chunk in found if chunk.keys is not None])
            tie = _kth(keys, need, low, high)
            go -= int(np.count_nonzero(keys < tie))
        for chunk in found:
            keep = self.keep[chunk.start : chunk.start + _CHUNK]
            if chunk.keys is not None and chunk.at is not None:
                stay = chunk.keys >= tie
                if go:
                    first = np.flatnonzero(chunk.keys == tie)[:go]
                    stay[first] = False
                    go -= first.size
                keep[chunk.at] = stay
            elif go < chunk.inside:
                keep[self._ties(chunk.start, tie)[go:]] = True
                go = 0
            else:
                go -= chunk.inside

    def _ties(self, start: int, tie: Any) -> NDArray[np.intp]:
        """Return where in a chunk the keys are that equal ``tie``."""
        scratch = np.empty(min(_CHUNK, self.bits.size), self.bits.dtype)
        tied = self.keys(start, scratch) == tie
        if self.among is not None:
            tied &= self.among[start : start + tied.size]
        return np.flatnonzero(tied)


def _kth(keys: Keys, k: int, low: Any, high: Any) -> Any:
    """Return the k-th lowest of keys between low and high: of few values by counting them."""
    if int(high) - int(low) < _FEW_VALUES:
        below = np.bincount(np.subtract(keys, low, dtype=np.int64)).cumsum()
        return keys.dtype.type(low + np.searchsorted(below, k))
    keys.partition(k - 1)
    return keys[k - 1]


def _one_group(bits: Keys, keep: Bools, prev: Bools | None, k: int, make: KeyMaker) -> None:
    """Select in one large group: with one pass over it, or a few where the sample misleads."""
    contest = _contest(bits, keep, prev, k, make)
    units = bits.size if contest.among is None else int(np.count_nonzero(contest.among))
    sample = contest.sample()
    info = np.iinfo(bits.dtype)
    least, most = int(info.min), int(info.max)  # between them the k-th is known to be
    deviations = 4
    while True:
        low, high = _bracket(sample, contest.k / max(units, 1), deviations, least, most)
        found = contest.find(low, high)
        inside = sum(chunk.inside for chunk in found)
        need = contest.k - (units - inside - sum(chunk.above for chunk in found))
        if 0 <= need <= inside:
            return contest.settle(found, need, low, high)
        least, most = (least, int(low) - 1) if need < 0 else (int(high) + 1, most)
        deviations *= 2


def _contest(bits: Keys, keep: Bools, prev: Bools | None, k: int, make: KeyMaker) -> _Contest:
    """Say who takes part: the kept ones; where fewer may go than went, those that went."""
    if prev is None:
        return _Contest(bits, keep, None, False, k, make)
    gone = bits.size - int(np.count_nonzero(prev))
    if k >= gone:
        return _Contest(bits, keep, prev, False, k - gone, make)
    return _Contest(bits, keep, ~prev, True, k, make)


def _bracket(
    sample: Keys, share: float, deviations: float, least: int, most: int
) -> tuple[Any, Any]:
    """Return two keys with that share of all keys below the k-th between them, but for bad luck.

    Where many keys are tied there, the bracket is a single key: nothing has to be collected.
    """
    size = sample.size
    margin = deviations * (math.sqrt(size * share * (1 - share)) + 1)
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low = max(least, int(sample[first])) if first >= 0 else least
    high = min(most, int(sample[last])) if last < size else most
    if low > high:  # the sample has nothing between the bounds
        return sample.dtype.type(least), sample.dtype.type(most)
    inside = np.searchsorted(sample, high, "right") - np.searchsorted(sample, low)
    if inside > 4 * margin:
        low = high = min(max(int(sample[min(int(share * size), size - 1)]), low), high)
    return sample.dtype.type(low), sample.dtype.type(high)
