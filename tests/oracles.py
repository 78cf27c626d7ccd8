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
        case "tensor":
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


def prune_oracle(
    scores: Tensor,
    pattern: Pattern,
    sparsity: Fraction,
    prev: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return the mask (True = keep) by stable argsort in each group, all sums exact."""
    shape = tuple(scores.shape)
    extent = _unit_extent(pattern.unit, shape)
    values = scores.double().tolist() if scores.dim() else scores.item()
    table = np.array(values, dtype=object).reshape(shape)
    members: dict[Index, list[Index]] = defaultdict(list)
    for index in itertools.product(*map(range, shape)):
        members[tuple(i // max(e, 1) for i, e in zip(index, extent, strict=True))].append(index)
    groups: dict[Any, list[Index]] = defaultdict(list)
    for unit in sorted(members):
        groups[_group_of(pattern.group, unit)].append(unit)
    mask = torch.ones(shape, dtype=torch.bool)
    for units in groups.values():
        k = math.floor(len(units) * sparsity)
        ranks = [
            table[members[u][0]]  # a single entry keeps its score, sign and all
            if math.prod(extent) == 1
            else _unit_score([table[i] for i in members[u]], pattern.norm)
            for u in units
        ]
        order = sorted(range(len(units)), key=lambda i: ranks[i])  # stable
        if prev is not None:
            gone = [not any(bool(prev[i]) for i in members[u]) for u in units]
            order.sort(key=lambda i: not gone[i])
        if floor is not None:
            gone = [not any(bool(floor[i]) for i in members[u]) for u in units]
            order.sort(key=lambda i: not gone[i])
            k = max(k, sum(gone))
        for i in order[:k]:
            for index in members[units[i]]:
                mask[index] = False
    return mask


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
