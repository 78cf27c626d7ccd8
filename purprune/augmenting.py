"""Augmenting: exact transposable masks of larger blocks, as a minimum-cost flow in many at once.

A block is a graph from its rows to its columns. Each row first takes its k cheapest entries, which
is the optimum without a rule for columns. While a column has too many, the cheapest path of moves
(a row gives an entry up and takes another) leads one of them to a column with too few. Paths that
are the cheapest keep the optimum (successive shortest paths), so that the end is one. Costs are
integers: sums are exact, and equal ones are equal.

Of several optima the first one in the order of the entries is taken: entry by entry, what can go
without a loss goes, along cycles of moves that cost nothing.

Arrays are shaped (m, m, blocks): blocks lie side by side, and share nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BITS = 4
"""The low bits of a distance, which say from which of up to 16 lines it comes."""
_NAMES = (1 << _BITS) - 1
_FAR = 1 << 59
_NEAR = 1 << 57
"""Above every distance of a path, and below every one that is none."""


def cheapest(costs: Ints, k: int, gone: Bools, kept: Bools) -> Bools:
    """Return what goes: k entries of every row and column, at the lowest cost, the first such.

    Args:
        costs: integers within +-2**43.
        k: how many, from 1 to m - 1.
        gone: entries that have to go.
        kept: entries that may not. With both there has to be a solution.
    """
    taken = _rows_alone(costs, k, gone, kept)
    active = np.arange(costs.shape[2])
    while (active := active[(taken[..., active].sum(axis=0) != k).any(axis=0)]).size:
        free = ~(gone | kept)[..., active]
        taken[..., active] = _one_moved(costs[..., active], taken[..., active], free, k)
    tight = _tight(costs, taken, ~(gone | kept))
    tied = np.flatnonzero(tight.any(axis=(0, 1)))
    if tied.size:
        taken[..., tied] = _first_of_equals(taken[..., tied], tight[..., tied])
    return taken


def _rows_alone(costs: Ints, k: int, gone: Bools, kept: Bools) -> Bools:
    """Return the cheapest k entries of every row; what has to go is cheap, what may not dear."""
    keys = (costs << _BITS) + np.arange(len(costs))[:, None]
    keys[gone] -= _FAR
    keys[kept] += _FAR
    lowest: Bools = keys <= np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
    return lowest


class _Paths(NamedTuple):
    """Distances of lines, and from which other line each is reached; -1: from none."""

    columns: Ints
    rows: Ints
    to_column: Ints
    to_row: Ints

    def walk_back(self, taken: Bools, column: Ints) -> None:
        """Move, in ``taken``, along the path to a column of each block."""
        each = np.arange(taken.shape[2])
        while (each := each[self.to_column[column[each], each] >= 0]).size:
            row = self.to_column[column[each], each]
            taken[row, column[each], each] = True
            column[each] = self.to_row[row, each]
            taken[row, column[each], each] = False


def _shortest(costs: Ints, taken: Bools, free: Bools, columns: Ints) -> _Paths:
    """Return the shortest paths of moves from columns at the distances given.

    Bellman and Ford's rounds, until nothing is nearer in any block: a row gives up what it takes in
    a column that is reached, and takes another. No cycle costs less than nothing, so they end.
    """
    lines = np.arange(len(costs))
    give = np.where(taken & free, lines[:, None] - (costs << _BITS), _FAR)
    take = np.where(~taken & free, lines[:, None, None] + (costs << _BITS), _FAR)
    rows = np.full_like(columns, _FAR)
    to_column, to_row = np.full_like(columns, -1), np.full_like(columns, -1)
    while True:
        _nearer((columns + give).min(axis=1), rows, to_row)
        if not _nearer((rows[:, None] + take).min(axis=0), columns, to_column):
            return _Paths(columns, rows, to_column, to_row)


def _nearer(found: Ints, known: Ints, whence: Ints) -> bool:
    """Write what is nearer than known, and whence; tell whether anything is."""
    better = (found & ~_NAMES < known) & (found < _NEAR)
    np.copyto(known, found & ~_NAMES, where=better)
    np.copyto(whence, found & _NAMES, where=better)
    return bool(better.any())


def _one_moved(costs: Ints, taken: Bools, free: Bools, k: int) -> Bools:
    """Return what is taken after one move along the cheapest path from too many to too few."""
    surplus = taken.sum(axis=0) - k
    paths = _shortest(costs, taken, free, np.where(surplus > 0, 0, _FAR))
    goals = np.where(surplus < 0, paths.columns, _FAR)
    if (goals.min(axis=0) >= _NEAR).any():
        raise RuntimeError("Expected blocks with a solution; one has none.")
    taken = taken.copy()
    paths.walk_back(taken, goals.argmin(axis=0))
    return taken


def _tight(costs: Ints, taken: Bools, free: Bools) -> Bools:
    """Return the entries that may change without a loss: those on cycles that cost nothing.

    Arcs on shortest paths from everywhere are those that may lie on such a cycle. Lines without an
    arc in and an arc out lie on none, and are taken off until none is left.
    """
    paths = _shortest(costs, taken, free, np.zeros(costs.shape[1:], np.int64))
    tight: Bools = np.equal(paths.columns - paths.rows[:, None], costs << _BITS) & free
    while True:
        give, take = tight & taken, tight & ~taken
        rows = give.any(axis=1, keepdims=True) & take.any(axis=1, keepdims=True)
        left = tight & rows & give.any(axis=0) & take.any(axis=0)
        if np.array_equal(left, tight):
            return left
        tight = left


def _first_of_equals(taken: Bools, tight: Bools) -> Bools:
    """Return the first optimum in the order of entries: each goes if it can, and is settled."""
    taken, tight = taken.copy(), tight.copy()
    for i, j in np.ndindex(*taken.shape[:2]):
        each = np.flatnonzero(tight[i, j] & ~taken[i, j])
        tight[i, j] = False  # settled
        if not each.size:
            continue
        part, free = taken[..., each], tight[..., each]
        start = np.full(part.shape[1:], _FAR)
        start[j] = 0
        paths = _shortest(np.zeros(part.shape, np.int64), part, free, start)
        there = np.flatnonzero(paths.rows[i] < _NEAR)
        part, paths = part[..., there], _Paths(*(of[:, there] for of in paths))
        column = paths.to_row[i].copy()
        part[i, column, np.arange(there.size)] = False
        paths.walk_back(part, column)
        part[i, j] = True
        taken[..., each[there]] = part
    return taken
