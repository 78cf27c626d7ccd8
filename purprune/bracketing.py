"""One large group: the first k found with about one pass over the scores.

A sample brackets the k-th key. The pass writes the mask above the bracket and collects what is
inside; only this is ranked. Where many keys are equal the bracket is a single one: its ties are
counted, not collected, and a look back at some chunks keeps the last of them. A sample that
misleads costs another pass, between bounds that are known by then, and no bit. What was pruned
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
from purprune.scratch import scratch
from purprune.threads import in_threads

_CHUNK = 1 << 19
"""Keys that are made at a time, so that they stay in the cache."""
_CHUNKS_PER_THREAD = 3
"""At least."""
_SAMPLE = 64
"""Times the root of the number of units that take part is the size of the sample of all."""
_LINE = 32
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
    units = contest.units
    info = np.iinfo(bits.dtype)
    least, most = int(info.min), int(info.max)  # between them the k-th is known to be
    before, behind = 0, 0  # units below the one and above the other
    sample, deviations = contest.sample(), 4
    while True:
        share = (contest.k - before) / max(units - before - behind, 1)
        low, high = map(bits.dtype.type, _bracket(sample, share, deviations, least, most))
        found = contest.find(low, high)
        above, inside = sum(chunk.above for chunk in found), sum(chunk.inside for chunk in found)
        need = contest.k - (units - inside - above)
        if 0 <= need <= inside:
            return contest.settle(found, need, low, high)
        if need < 0:
            most, behind = int(low) - 1, inside + above
        else:
            least, before = int(high) + 1, units - above
        sample = sample[(sample >= least) & (sample <= most)]
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
    units: int
    """How many take part."""
    k: int
    """How many of those that take part go."""
    make: KeyMaker

    def find(self, low: Any, high: Any) -> list[_Chunk]:
        """Decide what is above the bracket, and find what is inside, in one pass."""

        def scan(starts: Sequence[int]) -> list[_Chunk]:
            size = min(_CHUNK, self.bits.size)
            with scratch(size, self.bits.dtype) as keys, scratch(size, np.bool_) as flags:
                return [self._scan(start, low, high, keys, flags) for start in starts]

        starts = range(0, self.bits.size, _CHUNK)
        return [chunk for run in in_threads(scan, starts, _CHUNKS_PER_THREAD) for chunk in run]

    def _scan(self, start: int, low: Any, high: Any, memory: Keys, flags: Bools) -> _Chunk:
        at = slice(start, min(start + _CHUNK, self.bits.size))
        keys = self.make(self.bits[at], memory[: at.stop - start])
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
        where = np.flatnonzero(inside)
        return _Chunk(at, found, where.size, keys[where], where)

    def sample(self) -> Keys:
        """Return the keys of a few units, spread evenly."""
        line = _LINE if self.bits.size >= _LINE else 1
        whole = self.bits.size - self.bits.size % line
        size = math.ceil(_SAMPLE * math.sqrt(self.units) / line)
        at = spread_evenly(size, whole // line)
        bits = np.take(self.bits[:whole].reshape(-1, line), at, axis=0)
        if self.among is not None:
            bits = bits[np.take(self.among[:whole].reshape(-1, line), at, axis=0)]
        return self.make(bits.reshape(-1), np.empty(bits.size, bits.dtype))

    def settle(self, found: Sequence[_Chunk], need: int, low: Any, high: Any) -> None:
        """Keep what is inside, but for the first ``need`` by (key, index)."""
        tie, go = low, need
        if need and low < high:
            keys = np.concatenate([chunk.keys for chunk in found if chunk.keys is not None])
            tie = _kth(keys, need, low, high)
            go -= int(np.count_nonzero(keys < tie))
        goes = []  # of how many ties, chunk by chunk
        for chunk in found:
            ties = chunk.inside if chunk.keys is None else int(np.count_nonzero(chunk.keys == tie))
            goes.append(min(go, ties))
            go -= goes[-1]

        some_stay = [i for i, chunk in enumerate(found) if goes[i] < chunk.inside]

        def stay(run: Sequence[int]) -> None:
            for i in run:
                self._keep_inside(found[some_stay[i]], goes[some_stay[i]], tie)

        in_threads(stay, range(len(some_stay)), _CHUNKS_PER_THREAD)

    def _keep_inside(self, chunk: _Chunk, go: int, tie: Any) -> None:
        """Keep what is inside and not below the tie, but for the first ties that go."""
        keep = self.keep[chunk.at]
        if chunk.keys is not None:
            stay = chunk.keys >= tie
            if go:
                stay[np.flatnonzero(chunk.keys == tie)[:go]] = False
            keep[chunk.where] = stay
            return
        part = self.bits[chunk.at]
        with scratch(part.size, part.dtype) as memory, scratch(part.size, np.bool_) as flags:
            tied = np.equal(self.make(part, memory), tie, out=flags)
            if self.among is not None:
                tied &= self.among[chunk.at]
            if go:
                tied[np.flatnonzero(tied)[:go]] = False
            keep |= tied


def _kth(keys: Keys, k: int, low: Any, high: Any) -> Any:
    """Return the k-th lowest of keys between low and high: of few values by counting them."""
    if int(high) - int(low) < _FEW_VALUES:
        below = np.bincount(np.subtract(keys, low, dtype=np.int64)).cumsum()
        return keys.dtype.type(low + np.searchsorted(below, k))
    keys.partition(k - 1)
    return keys[k - 1]


def _contest(bits: Keys, keep: Bools, prev: Bools | None, k: int, make: KeyMaker) -> _Contest:
    if prev is None:
        return _Contest(bits, keep, None, False, bits.size, k, make)
    among, others, units, go = those_that_take_part(prev, k)
    return _Contest(bits, keep, among, others, units, go, make)


def those_that_take_part(kept: Bools, k: int) -> tuple[Bools, bool, int, int]:
    """Say who takes part: the kept ones; where fewer may go than went, those that went.

    Args:
        kept: which units of one group are kept so far, 1-D.
        k: how many go in the end.

    Returns:
        Which units take part, whether the others stay, how many take part, and how many of these
        go.
    """
    units = _count(kept)
    gone = kept.size - units
    return (kept, False, units, k - gone) if k >= gone else (~kept, True, gone, k)


def _count(flags: Bools) -> int:
    def count(starts: Sequence[int]) -> int:
        return sum(int(np.count_nonzero(flags[at : at + _CHUNK])) for at in starts)

    return sum(in_threads(count, range(0, flags.size, _CHUNK), _CHUNKS_PER_THREAD))


def _bracket(
    sample: Keys, share: float, deviations: float, least: int, most: int
) -> tuple[int, int]:
    """Return two keys with that share of all keys below the k-th between them, but for bad luck.

    Where a quarter of what is between them equals the middle they are that key: nothing has to be
    collected, and should it not be the k-th, the next bracket is beside it. A heavy tie at an end
    that does not reach the middle is left out.
    """
    size = sample.size
    margin = deviations * (math.sqrt(size * share * (1 - share)) + 1)
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    window = _between(sample, max(first, 0), min(last, size - 1))
    if not window.size:
        return least, most
    middle = window[min(int(share * size) - max(first, 0), window.size - 1)]
    ties = np.count_nonzero(window == middle)
    if ties > 1 and 4 * ties >= window.size:
        return int(middle), int(middle)
    low, high = int(window[0]), int(window[-1])
    low += int(np.count_nonzero(sample == low) > last - first)
    high -= int(np.count_nonzero(sample == high) > last - first)
    return low if first >= 0 else least, high if last < size else most


def _between(sample: Keys, first: int, last: int) -> Keys:
    """Return the keys of these ranks, from 0, sorted."""
    if first > last:
        return sample[:0]
    if sample.itemsize == 8:  # which leave no bits for an index
        return np.sort(sample)[first : last + 1]
    # no two pairs are equal: of tied keys a partition is slow
    with scratch(sample.size, np.int64) as pairs:
        np.left_shift(sample, 32, out=pairs, dtype=np.int64)
        pairs |= np.arange(sample.size)
        pairs.partition(first)
        pairs[first:].partition(last - first)
        return np.sort(pairs[first : last + 1] >> 32).astype(sample.dtype)
