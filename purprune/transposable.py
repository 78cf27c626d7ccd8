"""Transposable masks: in every m x m block each row and each column keeps as many entries.

Of all masks of a block with ``k = floor(m * sparsity)`` zeros in every row and every column, the
one with the largest sum of kept scores is taken; of equal sums the first, reading the block row by
row, pruned before kept. Blocks share nothing. It is an exact optimum:

- scores are read as integers, in steps of 2**-42 of the block's largest: sums of them are exact, so
  that layouts, chunks, threads and shards change no bit, and ties are ties. An infinity counts more
  than all finite scores of its block together (the steps of which are wider then);
- up to m = 4 all masks are compared: the rows' choices are put together one row after the other,
  and of those with the same columns the best is carried along;
- larger blocks are a minimum-cost flow (:mod:`purprune.augmenting`).

What ``prev`` prunes can stay: the rest of a block in which all lines have as many entries divides
into sets with one entry in every line (Koenig's theorem), so any number of those can follow.

Source: Hubara, Chmiel, Island, Banner, Naor and Soudry, "Accelerated Sparse Neural Training: A
Provable and Efficient Method to Find N:M Transposable Masks", 2021, where larger blocks are solved
by a flow, or to within a factor of 2.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purprune.augmenting import Bools, Ints, cheapest
from purprune.errors import ConfigError, NaNError
from purprune.groups import Group, TransposableGroup
from purprune.ranking import count
from purprune.threads import in_threads

_STEPS = 42
"""The largest finite score of a block is read as about 2**42."""
_CHUNK = 1 << 16
"""Entries that are looked at at a time, so that the scratch of a thread is a few megabytes."""
_ALL_UP_TO = 4
_DIGIT = 3
"""Bits of a row's choice: 4 entries have at most 6 with the same count."""
_NEVER = -(1 << 60)


def _blocks(values: Any, group: TransposableGroup) -> Any:
    """Return a view with the dims blocks down, rows, blocks across, columns, and all others."""
    moved, m = np.moveaxis(values, group.axes(values.shape), (0, 1)), group.m
    down, across, *others = moved.shape
    return moved.reshape(down // m, m, across // m, m, *others)


def _parts(blocks: Any) -> tuple[int, range]:
    """Return along which dim to cut between blocks, and where the parts begin."""
    sizes = [0 if d in (1, 3) else n for d, n in enumerate(blocks.shape)]
    at = sizes.index(max(sizes))
    return at, range(0, sizes[at], max(1, _CHUNK * sizes[at] // max(blocks.size, 1)))


def _lines_first(blocks: Any) -> Any:
    return np.moveaxis(blocks, (1, 3), (0, 1))


def _flat(part: Any) -> Any:
    return part.reshape(*part.shape[:2], -1)


def keep_largest_sum(
    scores: Tensor,
    absolute: bool,
    group: TransposableGroup,
    sparsity: Fraction,
    prev: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return which entries to keep: in every line of every block all but k, of the largest sum.

    In a block of which the floor prunes more than k in every line, it is as many as the floor.

    Args:
        scores: one score per entry.
        absolute: take ``|scores|``.
        group: the blocks, which divide the tensor.
        sparsity: the fraction of each line to prune; ``k = floor(m * sparsity)``.
        prev: what was kept so far, see :func:`refuse_uneven`; while k does not fall, no more is.
        floor: what may be kept.

    Raises:
        NaNError: a score is NaN. The message has no name; callers know it.
    """
    source = scores.float() if scores.dtype == torch.bfloat16 or scores.itemsize == 1 else scores
    values = _blocks(source.detach().cpu().resolve_neg().numpy(), group)
    keep = np.empty(scores.shape, np.bool_)
    into = _blocks(keep, group)
    given = [None if x is None else _blocks(x.cpu().numpy(), group) for x in (prev, floor)]
    at, starts = _parts(values)
    k = count(group.m, sparsity)

    def select(some: Sequence[int]) -> None:
        for start in some:
            where = (slice(None),) * at + (slice(start, start + starts.step),)
            part = _lines_first(values[where])
            worth = _integers(_flat(part).astype(np.float64), absolute)
            before, least = (None if x is None else ~_flat(_lines_first(x[where])) for x in given)
            _lines_first(into[where])[...] = _kept(worth, k, before, least).reshape(part.shape)

    in_threads(select, starts)
    return torch.from_numpy(keep).to(scores.device)


def _integers(scores: Any, absolute: bool) -> Ints:
    """Return scores in steps of a power of two that depends on the largest of the block."""
    scores = np.abs(scores, out=scores) if absolute else scores
    top = np.abs(scores).max(axis=(0, 1))
    if np.isnan(top).any():
        raise NaNError("Expected numbers; got NaN.")
    steps = np.full(top.shape, _STEPS)
    if np.isinf(top).any():
        steps[np.isinf(top)] -= 2 * len(scores).bit_length() + 1  # so that it counts more than all
        top = np.abs(np.where(np.isinf(scores), 0, scores)).max(axis=(0, 1))
    steps -= np.frexp(top)[1]
    for half in (steps // 2, steps - steps // 2):  # in two factors, each of which is a float
        scores *= np.ldexp(1.0, half)
    largest = float(1 << _STEPS)
    integers: Ints = np.rint(np.clip(scores, -largest, largest)).astype(np.int64)
    return integers


def _kept(worth: Ints, k: int, before: Bools | None, least: Bools | None) -> Bools:
    """Return what stays in each block: k of a line go, or what was given where that is more."""
    none = np.zeros(worth.shape, np.bool_)
    least = none if least is None else least
    before = least if before is None else before | least
    due = np.maximum(least[0].sum(axis=0), k)
    falls = before[0].sum(axis=0) > due
    gone = np.where(falls, least, before)
    kept = ~before & falls
    keep = np.empty(worth.shape, np.bool_)
    for each in np.unique(due).tolist():
        own: Any = slice(None) if (due == each).all() else due == each
        keep[..., own] = _best(each, worth[..., own], gone[..., own], kept[..., own])
    return keep


def _best(k: int, worth: Ints, gone: Bools, kept: Bools) -> Bools:
    if k in (0, len(worth)):
        return np.full(worth.shape, k == 0)
    if len(worth) <= _ALL_UP_TO:
        return _of_all(k, worth, gone, kept)
    return ~cheapest(worth, k, gone, kept)


@functools.lru_cache(maxsize=32)
def _choices(m: int, k: int) -> list[tuple[bool, ...]]:
    """Return what a row may keep, in the order of ties: pruned before kept."""
    return sorted(set(itertools.permutations([False] * k + [True] * (m - k))))


def _of_all(k: int, worth: Ints, gone: Bools, kept: Bools) -> Bools:
    """Return the best of all masks; the low bits of a sum are the rows' choices, the first ahead.

    A mask is the choices of the upper rows and those of the lower ones: what the first leave of the
    columns, the others take.
    """
    m = len(worth)
    choices = _choices(m, k)
    rows = []
    for i, own in enumerate(_sums(worth, choices, gone, kept)):
        rows.append([total - (d << _DIGIT * (m - 1 - i)) for d, total in enumerate(own)])
    upper, lower = _by_columns(rows[: m // 2], choices), _by_columns(rows[m // 2 :], choices)
    fits = [(c, tuple(m - k - n for n in c)) for c in upper]
    best = np.maximum.reduce([upper[c] + lower[rest] for c, rest in fits if rest in lower])
    shifts = _DIGIT * np.arange(m - 1, -1, -1)
    digits = (-best >> shifts[:, None]) & ((1 << _DIGIT) - 1)
    return np.moveaxis(np.array(choices)[digits], 2, 1)


def _sums(
    worth: Ints, choices: list[tuple[bool, ...]], gone: Bools, kept: Bools
) -> Iterator[list[Ints]]:
    """Yield for each row the sums of its choices, above the low bits."""
    bound = bool(gone.any() or kept.any())
    for row, no, yes in zip(worth << _DIGIT * len(worth), gone, kept, strict=True):
        totals = [functools.reduce(np.add, row[list(choice)]) for choice in choices]
        if bound:
            for choice, total in zip(choices, totals, strict=True):
                stays = np.array(choice)
                total[no[stays].any(axis=0) | yes[~stays].any(axis=0)] = _NEVER
        yield totals


def _by_columns(
    rows: list[list[Ints]], choices: list[tuple[bool, ...]]
) -> dict[tuple[int, ...], Ints]:
    """Return the best sum of some rows for each number of entries that they keep in the columns."""
    best: dict[tuple[int, ...], Any] = {(0,) * len(choices[0]): 0}
    for row in rows:
        found: dict[tuple[int, ...], Any] = {}
        for columns, total in best.items():
            for choice, more in zip(choices, row, strict=True):
                key = tuple(n + c for n, c in zip(columns, choice, strict=True))
                new = total + more
                found[key] = np.maximum(found[key], new, out=found[key]) if key in found else new
        best = found
    return best


def refuse_uneven(
    name: str, group: Group, *, floor: Tensor | None = None, **given: Tensor | None
) -> None:
    """Raise unless given masks prune as many entries in every row and column of each block.

    Any other could leave a block without a solution at some later step. Other groups take any.

    Args:
        name: the parameter, for errors.
        group: the group of its rule.
        floor: what may be kept; the others are looked at together with it.
        given: masks by what they are called.
    """
    if not isinstance(group, TransposableGroup):
        return
    _refuse_uneven("floor", name, group, floor)
    for what, mask in given.items():
        both = mask & floor if mask is not None and floor is not None else mask
        _refuse_uneven(what, name, group, both)


def _refuse_uneven(what: str, name: str, group: TransposableGroup, mask: Tensor | None) -> None:
    if mask is None:
        return
    rows, columns = lines_kept(mask, group)
    odd = ((rows != rows[:1]) | (columns != rows[:1])).any(axis=0)
    if odd.any():
        block = f"{group.m} x {group.m}"
        raise ConfigError(
            f"Expected {what}[{name!r}] to prune as many entries in every row and column of each "
            f"{block} block; in {int(odd.sum())} of {odd.size} it does not. Take masks of "
            f"NM({group.zeros}, {group.m}, transposable=True), or start without {what}."
        )


def lines_kept(mask: Tensor, group: TransposableGroup) -> tuple[Ints, Ints]:
    """Return how many entries each row and each column of a block keeps, shaped (m, blocks)."""
    kept = _flat(_lines_first(_blocks(mask.cpu().numpy(), group)))
    return kept.sum(axis=1), kept.sum(axis=0)
