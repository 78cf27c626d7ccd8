"""Selecting the first k with torch ops, for devices that share no memory with numpy.

Three ways, by the size of a group and of the tensor:

- up to 16 units (N:M): every unit counts how many of its group stand before it;
- few units: a stable sort, which takes few calls;
- else an interval of keys is halved for all groups at once, until the k-th key is left. Each round
  counts the keys up to the middle: it reads the keys and writes a byte for each, where a sort
  writes values and positions, twelve bytes for each key of four. There are as many rounds as a key
  has bits.

Counts are integers: in which order a device adds them changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from purprune.scratch import DEVICE_CHUNK
from purprune.selecting import SMALL_GROUP, Span

_SORT_UP_TO = 1 << 18
"""Keys that are sorted at a time, in little memory; halving would take ten times the calls."""


def all_but_lowest(
    bits: Tensor,
    prev: Tensor | None,
    lead: int,
    spans: Sequence[Span],
    make: Callable[[Tensor], Tensor],
    among: tuple[int, int],
) -> Tensor:
    """Return which units stay: all but the first k of each group by (key, index).

    Args:
        bits: scores read as integers; the first ``lead`` dims index rows, no group crosses them.
        prev: what was kept so far, in the same shape, or None. What it does not keep goes first.
        lead: 0 means one row.
        spans: how the columns of a row divide into groups.
        make: how bits become keys.
        among: between which two keys all are.
    """
    if bits.numel() == 0:
        return torch.ones(bits.shape, dtype=torch.bool, device=bits.device)

    def select(bits: Tensor, prev: Tensor | None) -> Tensor:
        shape = (math.prod(bits.shape[:lead]), math.prod(bits.shape[lead:]))
        keys, kept = make(bits).reshape(shape), None if prev is None else prev.reshape(shape)
        stay = []
        for start, stop, size, k in spans:
            part = keys[:, start:stop].reshape(-1, size)
            before = None if kept is None else kept[:, start:stop].reshape(-1, size)
            found = _all_but_lowest(part, before, k, among)
            stay.append(found.view(shape[0], stop - start))
        whole = torch.cat(stay, dim=1) if len(stay) > 1 else stay[0]
        return whole.view(bits.shape)

    if bits.numel() <= DEVICE_CHUNK or lead == 0:
        return select(bits, prev)
    at = max(range(lead), key=bits.shape.__getitem__)
    rows = max(1, DEVICE_CHUNK * bits.shape[at] // bits.numel())
    keep = torch.empty(bits.shape, dtype=torch.bool, device=bits.device)
    for start in range(0, bits.shape[at], rows):
        part = (slice(None),) * at + (slice(start, start + rows),)
        keep[part] = select(bits[part], None if prev is None else prev[part])
    return keep


def _all_but_lowest(keys: Tensor, kept: Tensor | None, k: int, among: tuple[int, int]) -> Tensor:
    """Mark all but the first k of each row by (kept, key, index)."""
    size = keys.shape[1]
    if k <= 0 or k >= size:
        return torch.full(keys.shape, k <= 0, dtype=torch.bool, device=keys.device)
    if size <= SMALL_GROUP:
        return _by_shifts(keys, kept, k)
    return (_by_sort if keys.numel() <= _SORT_UP_TO else _by_halves)(keys, kept, k, among)


def _by_shifts(keys: Tensor, kept: Tensor | None, k: int) -> Tensor:
    """Count for each unit how many of its group stand before it."""
    ahead = torch.zeros(keys.shape, dtype=torch.uint8, device=keys.device)
    for shift in range(1, keys.shape[1]):
        left_first = keys[:, :-shift] <= keys[:, shift:]
        if kept is not None:
            left, right = kept[:, :-shift], kept[:, shift:]
            left_first = torch.where(left == right, left_first, right)
        ahead[:, shift:].add_(left_first)
        ahead[:, :-shift].add_(~left_first)
    return ahead >= k


def _by_sort(keys: Tensor, kept: Tensor | None, k: int, among: tuple[int, int]) -> Tensor:
    """Sort what went before all else; where more than k did, what stayed behind all else."""
    if kept is not None:
        first, last = among[0] - 1, among[1] + 1
        fit = _went(kept) <= k
        went, stayed = torch.where(fit, first, keys), torch.where(fit, keys, last)
        keys = torch.where(kept, stayed, went)
    lowest = torch.sort(keys, dim=1, stable=True).indices[:, :k]
    keep = torch.ones(keys.shape, dtype=torch.bool, device=keys.device)
    return keep.scatter_(dim=1, index=lowest, value=False)


def _by_halves(keys: Tensor, kept: Tensor | None, k: int, among: tuple[int, int]) -> Tensor:
    """Find the k-th key of each row, and of the ties with it keep the last ones.

    The kept ones are ranked, or in rows where more went than may go, those that went.
    """
    rows, size = keys.shape
    none = torch.zeros((rows, 1), dtype=torch.int64, device=keys.device)
    went = none if kept is None else _went(kept)
    fit = went <= k
    go = torch.where(fit, k - went, k)

    def number(compare: Callable[[Tensor, Tensor], Tensor], bound: Tensor) -> Tensor:
        total = none.clone()
        for part in _parts(size, DEVICE_CHUNK // rows):
            found = compare(keys[:, part], bound.to(keys.dtype))
            if kept is not None:
                found &= torch.eq(kept[:, part], fit)
            total += _number(found)
        return total

    low, high = torch.full_like(go, among[0]), torch.full_like(go, among[1])
    for _ in range((among[1] - among[0]).bit_length()):
        middle = (low & high) + ((low ^ high) >> 1)  # of which no sum leaves 64 bits
        enough = number(torch.le, middle) >= go
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    go, kth = go - number(torch.lt, high), high.to(keys.dtype)
    stay = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    for part in _parts(size, DEVICE_CHUNK // 4 // rows):  # what is made of each takes ten bytes
        tied, found = keys[:, part] == kth, keys[:, part] >= kth
        if kept is not None:
            ranked = torch.eq(kept[:, part], fit)
            tied &= ranked
            found = torch.where(ranked, found, kept[:, part])
        so_far = tied.cumsum(dim=1, dtype=torch.int32)
        stay[:, part] = found ^ (tied & (so_far <= go))
        go = go - so_far[:, -1:]
    return stay


def _parts(size: int, columns: int) -> list[slice]:
    columns = max(1, columns)
    return [slice(start, start + columns) for start in range(0, size, columns)]


def _went(kept: Tensor) -> Tensor:
    """Return how many were pruned so far in each row, as a column."""
    return kept.shape[1] - _number(kept)


def _number(flags: Tensor) -> Tensor:
    """Return how many are set in each row, as a column."""
    return flags.sum(dim=1, keepdim=True)
