"""One large group: the first k found with about one pass over the scores.

A sorted sample brackets the k-th key. The pass writes the mask above the bracket and collects what
is inside; only this is ranked. A sample that misleads costs another pass and no bit. Where many
keys are tied the bracket is a single key: its ties are counted and not collected. What was pruned
before takes no part, or alone takes part where fewer may go than went.

Fresh memory pages cost more than arithmetic, so keys are made in chunks, in scratch that is used
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purprune.keys import Bools, KeyMaker, Keys, spread_evenly
from purprune.threads import in_threads

_CHUNK = 1 << 19
"""Keys that are made at a time, so that they stay in the cache."""
_SAMPLE = 32
"""Times the root of the number of keys is the size of the sample."""
_LINE = 16
"""Neighbours that are sampled together: memory is read in lines."""
_FEW_VALUES = 1 << 16
"""Between bounds as close as this values are counted instead of partitioned."""


def keep_all_but_lowest_of_one_group(
    bits: Keys, keep: Bools, prev: Bools | None, k: int, make: KeyMaker
) -> None:
    """Write to ``keep`` which units of one large group stay: all but the first k.

    Raises:
        NotANumberError: a score is NaN.
    """
    contest = _contest(bits, keep, prev, k, make)
    units = bits.size if contest.among is None else int(np.count_nonzero(contest.among))
    sample = contest.sample()
    info = np.iinfo(bits.dtype)
    least, most = int(info.min), int(info.max)  # between them the k-th is known to be
    deviations = 4
    while True:
        low, high = map(
            bits.dtype.type, _bracket(sample, contest.k / max(units, 1), deviations, least, most)
        )
        found = contest.find(low, high)
        inside = sum(chunk.inside for chunk in found)
        need = contest.k - (units - inside - sum(chunk.above for chunk in found))
        if 0 <= need <= inside:
            return contest.settle(found, need, low, high)
        least, most = (least, int(low) - 1) if need < 0 else (int(high) + 1, most)
        deviations *= 2


class _Chunk(NamedTuple):
    """What one pass found in a chunk: how many are above the bracket, and what is inside."""

    at: slice
    above: int
    inside: int
    keys: Keys | None = None
    where: NDArray[np.intp] | None = None


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
            keys, flags = np.empty(size, self.bits.dtype), np.zeros(-(-size // 8) * 8, np.bool_)
            return [self._scan(start, low, high, keys, flags) for start in starts]

        starts = range(0, self.bits.size, _CHUNK)
        return [chunk for run in in_threads(scan, starts) for chunk in run]

    def _scan(self, start: int, low: Any, high: Any, scratch: Keys, flags: Bools) -> _Chunk:
        at = slice(start, min(start + _CHUNK, self.bits.size))
        keys = self.make(self.bits[at], scratch[: at.stop - start])
        above = np.greater(keys, high, out=self.keep[at])
        inside = np.greater_equal(keys, low, out=flags[: keys.size])
        np.not_equal(inside, above, out=inside)
        if self.among is not None:
            above &= self.among[at]
            inside &= self.among[at]
        found = int(np.count_nonzero(above))
        if self.among is not None and self.others:
            np.greater_equal(above, self.among[at], out=above)  # above, or one of the others
        if low == high:  # all ties: where they are is asked for where they end
            return _Chunk(at, found, int(np.count_nonzero(inside)))
        flags[keys.size :] = False
        where = _where(flags)
        return _Chunk(at, found, where.size, keys[where], where)

    def sample(self) -> Keys:
        """Return the sorted keys of a few units, spread evenly."""
        line = _LINE if self.bits.size >= _LINE else 1
        whole = self.bits.size - self.bits.size % line
        size = math.ceil(_SAMPLE * math.sqrt(self.bits.size) / line)
        at = spread_evenly(size, whole // line)
        bits = np.take(self.bits[:whole].reshape(-1, line), at, axis=0)
        if self.among is not None:
            bits = bits[np.take(self.among[:whole].reshape(-1, line), at, axis=0)]
        keys = self.make(bits.reshape(-1), np.empty(bits.size, bits.dtype))
        keys = keys.astype(np.int32) if keys.itemsize == 2 else keys  # which sort faster
        keys.sort()
        return keys

    def settle(self, found: Sequence[_Chunk], need: int, low: Any, high: Any) -> None:
        """Keep what is inside, but for the first ``need`` by (key, index)."""
        tie, go = low, need
        if need and low < high:
            keys = np.concatenate([chunk.keys for chunk in found if chunk.keys is not None])
            tie = _kth(keys, need, low, high)
            go -= int(np.count_nonzero(keys < tie))
        for chunk in found:
            keep = self.keep[chunk.at]
            if chunk.keys is not None:
                stay = chunk.keys >= tie
                if go:
                    first = np.flatnonzero(chunk.keys == tie)[:go]
                    stay[first] = False
                    go -= first.size
                keep[chunk.where] = stay
            elif go < chunk.inside:
                keep[self._ties(chunk.at, tie)[go:]] = True
                go = 0
            else:
                go -= chunk.inside

    def _ties(self, at: slice, tie: Any) -> NDArray[np.intp]:
        """Return where in a chunk the keys are that equal ``tie``."""
        part = self.bits[at]
        tied = self.make(part, np.empty(part.size, part.dtype)) == tie
        if self.among is not None:
            tied &= self.among[at]
        return np.flatnonzero(tied)


def _where(flags: Bools) -> NDArray[np.intp]:
    """Return where flags are set, of which there are few: eight are looked at together."""
    words = flags.view(np.uint64)
    hit = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[hit].view(np.bool_))
    where: NDArray[np.intp] = (hit[found >> 3] << 3) + (found & 7)
    return where


def _kth(keys: Keys, k: int, low: Any, high: Any) -> Any:
    """Return the k-th lowest of keys between low and high: of few values by counting them."""
    if int(high) - int(low) < _FEW_VALUES:
        below = np.bincount(np.subtract(keys, low, dtype=np.int64)).cumsum()
        return keys.dtype.type(low + np.searchsorted(below, k))
    keys.partition(k - 1)
    return keys[k - 1]


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
) -> tuple[int, int]:
    """Return two keys with that share of all keys below the k-th between them, but for bad luck.

    Where many keys are tied there, the bracket is the one that most are: nothing has to be
    collected, and should it not be the k-th, the next bracket is beside it.
    """
    size = sample.size
    margin = deviations * (math.sqrt(size * share * (1 - share)) + 1)
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low = max(least, int(sample[first])) if first >= 0 else least
    high = min(most, int(sample[last])) if last < size else most
    if low > high:  # the sample has nothing between the bounds
        return least, most
    start, stop = np.searchsorted(sample, low), np.searchsorted(sample, high, "right")
    if stop - start > 4 * margin:
        keys, times = np.unique(sample[start:stop], return_counts=True)
        low = high = int(keys[times.argmax()])
    return low, high
