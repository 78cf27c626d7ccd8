"""One large group: the first k found with about one pass over the scores.

A sorted sample brackets the k-th key. The pass writes the mask above the bracket and collects the
few keys inside; only these are ranked. A sample that misleads costs another pass and no bit. Where
many keys are tied the bracket is a single key: its ties are counted and not collected. What was
pruned before takes no part, or alone takes part where fewer may go than went.

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
"""Keys that are made at a time: 2 MB of them, so that calls are few and scratch stays cached."""
_SAMPLE = 8
"""Times the root of the number of keys is the size of the sample."""
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
        low, high = _bracket(sample, contest.k / max(units, 1), deviations, least, most)
        found = contest.find(low, high)
        inside = sum(chunk.inside for chunk in found)
        need = contest.k - (units - inside - sum(chunk.above for chunk in found))
        if 0 <= need <= inside:
            return contest.settle(found, need, low, high)
        least, most = (least, int(low) - 1) if need < 0 else (int(high) + 1, most)
        deviations *= 2


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
        at = spread_evenly(size, self.bits.size)
        if self.among is not None:
            at = at[self.among[at]]
        keys = self.make(self.bits[at], np.empty(at.shape, self.bits.dtype))
        keys.sort(kind="stable" if keys.itemsize == 2 else None)  # which counts 16-bit keys
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
