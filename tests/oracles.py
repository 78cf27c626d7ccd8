"""Slow, plain oracles: every rule of the algebra once more, entry by entry, without torch."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purprune import Pattern

Index = tuple[int, ...]


def _unit_extent(unit: Any, shape: Index) -> Index:
    dims = len(shape)
    match unit.kind:
        case "entry":
            return (1,) * dims
        case "channel":
            return tuple(unit.size if d == unit.dim % dims else shape[d] for d in range(dims))
        case "kernel":
            return (unit.size, 1, *shape[2:])
        case "block":
            given = list(unit.shape) + [1] * (dims - len(unit.shape))
            return tuple(shape[d] if given[d] == -1 else given[d] for d in range(dims))
    raise AssertionError(unit)


def _group_of(group: Any, unit: Index) -> Any:
    match group.kind:
        case "tensor" | "global":
            return 0
        case "row":
            return unit[group.dim % len(unit)]
        case "every":
            at = group.dim % len(unit)
            return (*unit[:at], unit[at] // group.m, *unit[at + 1 :])
    raise AssertionError(group)


def _unit_score(scores: list[float], norm: str) -> Any:
    if any(math.isinf(s) for s in scores):
        return math.inf
    exact = [Fraction(s) for s in scores]
    if norm == "sum":
        return sum(exact)
    return sum(abs(s) if norm == "l1" else s * s for s in exact)


def _units(scores: Tensor, pattern: Pattern) -> list[tuple[Index, list[Index], Any]]:
    """Return every unit: its index in the grid, the entries in it, and its score."""
    shape = tuple(scores.shape)
    extent = _unit_extent(pattern.unit, shape)
    values = scores.double().tolist() if scores.dim() else scores.item()
    table = np.array(values, dtype=object).reshape(shape)
    members: dict[Index, list[Index]] = defaultdict(list)
    for index in itertools.product(*map(range, shape)):
        members[tuple(i // max(e, 1) for i, e in zip(index, extent, strict=True))].append(index)
    single = math.prod(extent) == 1  # a single entry keeps its score, sign and all
    return [
        (
            unit,
            members[unit],
            table[members[unit][0]]
            if single
            else _unit_score([table[i] for i in members[unit]], pattern.norm),
        )
        for unit in sorted(members)
    ]


Row = tuple[Tensor, list[Index], Any, bool, bool]


def _prune(units: list[Row], sparsity: Fraction) -> None:
    """Prune the first of (mask, entries, score, pruned before, by a floor) in their masks."""
    order = sorted(units, key=lambda unit: unit[2])  # stable
    order.sort(key=lambda unit: not unit[3])
    order.sort(key=lambda unit: not unit[4])
    k = max(math.floor(len(units) * sparsity), sum(unit[4] for unit in units))
    for mask, entries, *_ in order[:k]:
        for index in entries:
            mask[index] = False


def _gone(prev: Tensor | None, entries: list[Index]) -> bool:
    return prev is not None and not any(bool(prev[i]) for i in entries)


def prune_oracle(
    scores: Tensor,
    pattern: Pattern,
    sparsity: Fraction,
    prev: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return the mask (True = keep) by a stable sort in each group, all sums exact."""
    if pattern.group.kind == "transposable":
        return transposable_oracle(scores, pattern.group, sparsity, prev, floor)
    mask = torch.ones(tuple(scores.shape), dtype=torch.bool)
    groups: dict[Any, list[Row]] = defaultdict(list)
    for unit, entries, score in _units(scores, pattern):
        row = (mask, entries, score, _gone(prev, entries), _gone(floor, entries))
        groups[_group_of(pattern.group, unit)].append(row)
    for units in groups.values():
        _prune(units, sparsity)
    return mask


def even_masks(m: int, k: int) -> list[list[tuple[bool, ...]]]:
    """Return every mask of a block with k zeros in each row and column, in the order of ties."""
    rows = sorted(set(itertools.permutations([False] * k + [True] * (m - k))))
    found: list[list[tuple[bool, ...]]] = [[]]
    for i in range(m):
        found = [
            [*mask, row]
            for mask in found
            for row in rows
            if all(
                m - k - (m - 1 - i) <= sum(r[j] for r in [*mask, row]) <= m - k for j in range(m)
            )
        ]
    return found


def _first_best(block: Tensor, k: int, must_go: Tensor, may_go: Tensor) -> Any:
    """Return the first mask of a block with the largest kept sum, all sums exact."""
    values = block.double().tolist()
    largest = max([abs(v) for row in values for v in row if not math.isinf(v)], default=0) or 1
    sums = []
    for mask in even_masks(len(values), k):
        kept = torch.tensor(mask)
        if bool((kept & must_go).any()) or bool((~kept & ~may_go).any()):
            continue
        stay = block.double()[kept].tolist()
        infinite = sum((v > 0) - (v < 0) for v in stay if math.isinf(v))
        finite = sum(Fraction(v) / Fraction(largest) for v in stay if not math.isinf(v))
        sums.append(((infinite, finite), kept))
    best = max(s for s, _ in sums)
    return next(kept for s, kept in sums if s == best)


def _at_once(scores: Tensor, group: Any) -> list[tuple[slice | int, ...]]:
    """Return where the blocks of a transposable group lie."""
    down, across = (d % scores.dim() for d in group.dims)
    starts = [
        range(0, n, group.m) if d in (down, across) else range(n)
        for d, n in enumerate(scores.shape)
    ]
    return [
        tuple(slice(i, i + group.m) if d in (down, across) else i for d, i in enumerate(at))
        for at in itertools.product(*starts)
    ]


def transposable_oracle(
    scores: Tensor,
    group: Any,
    sparsity: Fraction,
    prev: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return the mask by a comparison of all masks of every block."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    floor = keep if floor is None else floor
    prev = floor if prev is None else prev & floor
    turned = group.dims[0] % scores.dim() > group.dims[1] % scores.dim() if scores.dim() else False
    for at in _at_once(scores, group):
        block, before, least = (t[at].T if turned else t[at] for t in (scores, prev, floor))
        due = max(math.floor(group.m * sparsity), int((~least[0]).sum()))
        falls = int((~before[0]).sum()) > due
        must_go, may_go = (~least, ~before) if falls else (~before, torch.ones_like(before))
        best = _first_best(block, due, must_go, may_go)
        keep[at] = best.T if turned else best
    return keep


def global_oracle(
    scores: dict[str, Tensor],
    pattern: Pattern,
    sparsity: Fraction,
    prev: dict[str, Tensor] | None = None,
    floor: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the masks by one stable sort of the units of all tensors, all sums exact."""
    prev, floor = prev or {}, floor or {}
    masks = {name: torch.ones(tuple(s.shape), dtype=torch.bool) for name, s in scores.items()}
    of_entries = all(
        math.prod(_unit_extent(pattern.unit, tuple(s.shape))) == 1 for s in scores.values()
    )

    def score_of(s: Tensor, entries: list[Index], score: Any) -> Any:
        values = [s.double()[i].item() for i in entries]
        return score if of_entries else _unit_score(values, pattern.norm)

    units = [
        (
            masks[name],
            entries,
            score_of(s, entries, score),
            _gone(prev.get(name), entries),
            _gone(floor.get(name), entries),
        )
        for name, s in scores.items()
        for _, entries, score in _units(s, pattern)
    ]
    _prune(units, sparsity)
    return masks


def balanced_oracle(
    scores: dict[str, Tensor],
    pattern: Pattern,
    k: int,
    limits: dict[str, tuple[int, int]],
    prev: dict[str, Tensor],
    floor: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the masks by one stable sort: the least of each tensor first, beyond its most never.

    All units are of several entries, or all are single ones.
    """
    masks = {name: torch.ones(tuple(s.shape), dtype=torch.bool) for name, s in scores.items()}
    first: list[Row] = []
    rest: list[Row] = []
    for name, s in scores.items():
        rows = [
            (masks[name], entries, score, _gone(prev.get(name), entries), held)
            for _, entries, score in _units(s, pattern)
            for held in [_gone(floor.get(name), entries)]
        ]
        own = sorted(rows, key=lambda row: (not row[4], not row[3], row[2]))
        low, high = limits[name]
        low = max(low, sum(row[4] for row in rows))
        first += own[:low]
        kept = [id(row) for row in own[low : max(low, high)]]
        rest += [row for row in rows if id(row) in kept]
    rest.sort(key=lambda row: (not row[4], not row[3], row[2]))
    for mask, entries, *_ in first + rest[: max(0, k - len(first))]:
        for index in entries:
            mask[index] = False
    return masks


def apportion_oracle(
    weights: list[int | Fraction], caps: list[int], quanta: list[int]
) -> dict[int, list[int]]:
    """Return the seats at every total that giving one quantum after the other passes by."""
    seats = [0] * len(caps)
    found = {0: [*seats]}
    while True:
        due = [
            (-Fraction(w) / (size * (2 * (had // size) + 1)), i)
            for i, (w, size, had) in enumerate(zip(weights, quanta, seats, strict=True))
            if w and had + size <= caps[i]
        ]
        if not due:
            return found
        _, i = min(due)
        seats[i] += quanta[i]
        found[sum(seats)] = [*seats]


def polynomial_oracle(
    step: int, updates: list[int], power: int, initial: Fraction, target: Fraction
) -> Fraction:
    """Return the sparsity by walking through all steps, as a training loop would."""
    value = initial
    for t in range(step + 1):
        if t in updates:
            i, last = updates.index(t), len(updates) - 1
            left = Fraction(last - i, last) if last else Fraction(0)
            value = target + (initial - target) * left**power
    return value


def walked(step: int, updates: list[int], at: Any, initial: Any) -> Any:
    """Return what a training loop holds at a step that puts ``at(i / (L - 1))`` at update i."""
    value = initial
    for t in range(step + 1):
        if t in updates:
            i, last = updates.index(t), len(updates) - 1
            value = at(i / last if last else 1.0)
    return value


def cosine_oracle(step: int, updates: list[int], initial: float, target: float) -> float:
    """Return the sparsity of a cosine ramp in floats."""
    return walked(
        step,
        updates,
        lambda x: target + (initial - target) * (1 + math.cos(math.pi * x)) / 2,
        initial,
    )


def exponential_oracle(step: int, updates: list[int], initial: float, target: float) -> float:
    """Return the sparsity of a ramp of equal factors of the density in floats."""

    def at(x: float) -> float:
        first, last = 1 - initial, 1 - target
        return 1 - (0.0 if first == 0 < x < 1 else first * (last / (first or 1)) ** x)

    return target if step >= updates[-1] else walked(step, updates, at, initial)
