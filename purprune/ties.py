"""Ties across processes: which of the units that share the last key go, by their position.

Whoever has all parts in order needs none of this: the number that is left is carried along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from purprune.counting import Reduce, count_down, summed
from purprune.parts import Group, Outcome, Part, tied_positions


class _End(NamedTuple):
    """The member in which the last tie is that goes; the positions of ties there, as a group."""

    member: int
    positions: Group


def share_ties(
    groups: Sequence[Group], outcomes: Sequence[Outcome], *, reduce: Reduce, bits: int = 16
) -> list[list[int]]:
    """Return for each part of each group how many of its ties go, as :func:`keep` takes it.

    Positions are counted down as keys are: first the member in which the last tie is that goes,
    then the flat index in it.
    """
    tied = [
        [_tied(group, part, outcome) for part in group.parts]
        for group, outcome in zip(groups, outcomes, strict=True)
    ]
    if all(outcome.ties == 0 for outcome in outcomes):
        return tied
    own = [_by_member(group, counts) for group, counts in zip(groups, tied, strict=True)]
    ends = [
        _end(group, outcome, counts)
        for group, outcome, counts in zip(groups, outcomes, summed(own, reduce), strict=True)
    ]
    last = count_down([end.positions for end in ends], reduce=reduce, bits=bits, sample=0)
    return [
        _shares(group, counts, end, found.bound)
        for group, counts, end, found in zip(groups, tied, ends, last, strict=True)
    ]


def _tied(group: Group, part: Part, outcome: Outcome) -> int:
    return sum(map(len, tied_positions(group, part, outcome))) if outcome.ties else 0


def _by_member(group: Group, tied: Sequence[int]) -> Tensor:
    counts = torch.zeros(len(group.sizes), dtype=torch.int64)
    for part, n in zip(group.parts, tied, strict=True):
        counts[part.member] += n
    return counts


def _end(group: Group, outcome: Outcome, by_member: Tensor) -> _End:
    if outcome.ties == 0:
        return _End(0, Group((), 0, (0,), torch.int64, absolute=True))
    behind = torch.cumsum(by_member, 0)
    member = int(torch.searchsorted(behind, outcome.ties))
    n = int(by_member[member])
    positions = Group(
        [_positions(group, part, outcome) for part in group.parts if part.member == member],
        k=outcome.ties - int(behind[member]) + n,
        sizes=(n,),
        dtype=torch.int64,
        absolute=True,
        among=(0, group.sizes[member] - 1),
    )
    return _End(member, positions)


def _positions(group: Group, part: Part, outcome: Outcome) -> Part:
    found = torch.cat([torch.empty(0, dtype=torch.int64), *tied_positions(group, part, outcome)])
    return Part(lambda: found, member=0)


def _shares(group: Group, tied: Sequence[int], end: _End, bound: int) -> list[int]:
    positions = iter(end.positions.parts)
    return [
        int((next(positions).scores() < bound).sum())
        if part.member == end.member and end.positions.k
        else n * (part.member < end.member)
        for part, n in zip(group.parts, tied, strict=True)
    ]
