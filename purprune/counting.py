"""Counting: the k-th of units that lie in many parts, found without putting the parts together.

The parts may be tensors that share one count, pieces of tensors on several machines, or tensors of
a file that is larger than memory. Within a group the order is total: what a floor prunes goes
first, then what ``prev`` pruned, then the lowest key (:mod:`purprune.ranking`), then the lower
member, then the lower flat index in it. An interval of keys is known to hold the k-th. In every
round it is cut into equal buckets, every part counts its keys per bucket, the counts are summed,
and the bucket with the k-th is the next interval, until it is a single key or ends exactly at the
k-th. A sample says where to look first; where it misleads, a round more is counted: luck moves
time, never bits.

Whoever has all parts calls :func:`count_down`, then :func:`keep` for one part after the other in
their order, and carries along how many ties are left. Where every process has some parts, all call
:func:`count_down` with the same groups but their own parts and a ``reduce`` that sums over
processes, then :func:`purprune.ties.share_ties`, then :func:`keep` with the number that is each
part's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from purprune.errors import NaNError
from purprune.parts import Group as Group
from purprune.parts import Outcome as Outcome
from purprune.parts import Part as Part
from purprune.parts import count_part, sampled
from purprune.parts import keep as keep
from purprune.ranking import key_range
from purprune.tallies import Buckets, Tally

Reduce = Callable[[Tensor], Tensor]


class _Search(NamedTuple):
    """A rank (from 1) among keys, and what is known of the key that has it."""

    kept: bool
    rank: int
    among: int
    known: tuple[int, int]
    """The lowest and the highest key that it may be."""
    window: tuple[int, int]
    """Where to count in the next round: a part of what is known."""
    bits: int

    def buckets(self) -> Buckets:
        """Return what to count in: as few powers of two as may be for each bucket."""
        low, high = self.window
        shift = max(0, (high - low).bit_length() - self.bits)
        shift += (high >> shift) - (low >> shift) >= 1 << self.bits
        return Buckets(low >> shift, (high >> shift) - (low >> shift) + 1, shift)

    def is_sped_up_by(self, sample: int) -> bool:
        """Tell whether a sample, a round of its own, saves more than one round without it."""
        shift = self.buckets().shift
        if shift <= self.bits:  # two rounds will do, or one where each key has its own bucket
            return shift > 0 and self.among > 4 * sample
        return self.among > sample


def alone(counts: Tensor) -> Tensor:
    """Return the counts of the only process there is."""
    return counts


def count_down(
    groups: Sequence[Group], *, reduce: Reduce = alone, bits: int = 19, sample: int = 1 << 16
) -> list[Outcome]:
    """Return which units of each group go: its first k.

    Args:
        groups: the groups. All processes give them in the same order.
        reduce: sums a 1-D int64 tensor on the CPU over all processes. It is called once in every
            round, for all groups together.
        bits: at most 2**bits buckets per group and round.
        sample: of a group with more units so many are looked at first, about, unless two rounds
            without it would be no slower; 0 means none.

    Raises:
        NaNError: a score is NaN, in every process if in one. The message has no name.
    """
    searches = _start(groups, reduce, bits)
    if sample:
        searches = _look_ahead(groups, searches, reduce, bits, sample)
    outcomes: dict[int, Outcome] = {}
    while rest := [i for i in range(len(groups)) if i not in outcomes]:
        counts = summed([_counted(groups[i], searches[i]) for i in rest], reduce)
        if any(int(found[0]) for found in counts):
            raise NaNError("Expected numbers; got NaN.")
        for i, found in zip(rest, counts, strict=True):
            next_ = _narrowed(searches[i], int(found[1]), found[2:])
            if isinstance(next_, Outcome):
                outcomes[i] = next_
            else:
                searches[i] = next_
    return [outcomes[i] for i in range(len(groups))]


def summed(counts: Sequence[Tensor], reduce: Reduce) -> list[Tensor]:
    """Sum the counts of all groups over all processes, at once."""
    together = np.concatenate([found.numpy() for found in counts])
    total = reduce(torch.from_numpy(together)).cpu()
    return list(torch.split(total, [len(found) for found in counts]))


def _start(groups: Sequence[Group], reduce: Reduce, bits: int) -> list[_Search]:
    """Count what floors and ``prev`` prune: these are the leading digits of the order."""
    own = [torch.tensor(_pruned(group)) for group in groups]
    pruned = summed(own, reduce) if groups else []
    return [
        _first(group, int(held), int(gone), bits)
        for group, (held, gone) in zip(groups, pruned, strict=True)
    ]


def _pruned(group: Group) -> tuple[int, int]:
    """Return how many units floors prune, and how many ``prev`` does besides."""
    held = sum(_false(part.floor) for part in group.parts)
    return held, sum(_false(_both(part)) for part in group.parts) - held


def _both(part: Part) -> Tensor | None:
    if part.prev is None or part.floor is None:
        return part.floor if part.prev is None else part.prev
    return part.prev & part.floor


def _false(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.numel() - int(torch.count_nonzero(mask))


def _first(group: Group, held: int, gone: int, bits: int) -> _Search:
    units, known = sum(group.sizes) - held, group.among or key_range(group.dtype, group.absolute)
    k = max(group.k - held, 0)
    kept = k >= gone
    rank, among = (k - gone, units - gone) if kept else (k, gone)
    return _Search(kept, rank, among, known, known, min(bits, max(8, units.bit_length())))


def _narrowed(search: _Search, below: int, counts: Tensor) -> _Search | Outcome:
    """Return the next interval, or what goes where this round found it."""
    buckets = search.buckets()
    start, shift = buckets.start, buckets.shift
    if search.rank <= below:
        known = search.known[0], start - 1
        at_the_end = search.rank == below
        return Outcome(search.kept, start) if at_the_end else _search_on(search, known)
    behind = below + np.cumsum(counts.numpy())
    at = int(np.searchsorted(behind, search.rank))
    if at == len(counts):
        return _search_on(search, (buckets.stop, search.known[1]))
    start += at << shift
    if int(behind[at]) == search.rank:
        return Outcome(search.kept, min(start + (1 << shift), search.known[1] + 1))
    if shift == 0:
        return Outcome(search.kept, start, search.rank - int(behind[at]) + int(counts[at]))
    return _search_on(search, (start, start + (1 << shift) - 1))


def _search_on(search: _Search, known: tuple[int, int]) -> _Search:
    if known[0] > known[1]:
        raise RuntimeError(
            "Expected scores that stay as they are while they are counted; the counts contradict "
            "each other. Does another thread write to the weights?"
        )
    return search._replace(known=known, window=known)


def _counted(group: Group, search: _Search) -> Tensor:
    tally = Tally(search.buckets())
    for part in group.parts:
        count_part(group, part, search.kept, search.buckets(), tally)
    return tally.counts()


def _look_ahead(
    groups: Sequence[Group], searches: Sequence[_Search], reduce: Reduce, bits: int, sample: int
) -> list[_Search]:
    """Return searches whose windows hold the rank, as a sample says, but for bad luck (4 sigma)."""
    large = [i for i, search in enumerate(searches) if search.is_sped_up_by(sample)]
    samples = [
        [sampled(groups[i], part, searches[i].kept, sample) for part in groups[i].parts]
        for i in large
    ]
    own = torch.tensor([sum(map(len, found)) for found in samples], dtype=torch.int64)
    sizes = reduce(own).tolist() if large else []
    ends: list[Group] = []
    for i, found, size in zip(large, samples, sizes, strict=True):
        for k in _ranks_around(searches[i].rank / searches[i].among, size):
            parts = [Part(lambda scores=scores: scores, 0) for scores in found]  # type: ignore[misc]
            ends.append(groups[i]._replace(parts=parts, sizes=(size,), k=k))
    narrowed = list(searches)
    outcomes = count_down(ends, reduce=reduce, bits=bits, sample=0)
    for i, size, low, high in zip(large, sizes, outcomes[::2], outcomes[1::2], strict=True):
        first, last = searches[i].known
        if _ranks_around(searches[i].rank / searches[i].among, size)[1] < size:
            last = min(last, high.bound)
        narrowed[i] = searches[i]._replace(window=(max(first, low.bound - 1), last))
    return narrowed


def _ranks_around(share: float, size: int) -> tuple[int, int]:
    """Return two ranks in a sample, between which the unit is that has so many below."""
    margin = 4 * math.sqrt(size * share * (1 - share)) + 4
    low, high = math.floor(share * size - margin), math.ceil(share * size + margin)
    return max(low, 0), min(high, size)
