"""Units: from scores of entries to scores of units, and from units back to entries.

Sums run in float64 (float32 where the device has none) and always in the same order: for each dim
from the last to the first, halves of the unit are added elementwise until one is left. Threads,
strides and devices with float64 change no bit, since no reduction of a library takes part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purprune.patterns import Norm
from purprune.scratch import DEVICE_CHUNK, scratch
from purprune.threads import in_threads

_CHUNK = 1 << 18
"""Entries that are reduced at a time on the CPU, so that float64 scratch stays in the cache."""

_SHORT = 16
"""A loop over fewer neighbours costs more than what it does."""

Array = Any  # numpy's or torch's: the arithmetic below is written once for both


def grid_shape(block: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many units there are along each dim, ragged ones included."""
    return tuple(-(-n // b) for b, n in zip(block, shape, strict=True))


def is_entry(block: Sequence[int]) -> bool:
    """Tell whether a unit is a single entry, which keeps its score as it is."""
    return all(b == 1 for b in block)


def unit_scores(scores: Tensor, block: Sequence[int], norm: Norm) -> Tensor:
    """Return one score per unit, shaped like the unit grid.

    The L2 norm is left squared: the order is the same, and no rounding of roots makes ties. Squares
    of float64 entries that are below 2**-1074 of the tensor's largest square count as 0.
    """
    if is_entry(block):
        return scores
    scores = scores.float() if scores.itemsize == 1 else scores  # float8
    grid = grid_shape(block, scores.shape)
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    if scores.numel() == 0:
        return torch.zeros(grid, dtype=wide, device=scores.device)
    exponent = exponent_of(scores) if norm == "l2" and scores.dtype == wide else 0
    if scores.device.type == "cpu":
        return _reduced_on_cpu(scores, block, norm, exponent)
    cut = _cut(scores, block, DEVICE_CHUNK)
    found = torch.empty(grid, dtype=wide, device=scores.device)
    for start in cut.starts:
        part = scores[cut.entries(start)].to(wide, copy=True)
        found[cut.units(start)] = _reduced(part, block, norm, exponent)
    return found


class _Cut(NamedTuple):
    """Chunks of a tensor that no unit crosses: some units along one dim, all along the others."""

    dim: int
    starts: range
    """The first unit of each along that dim."""
    size: int
    """The unit's extent along it."""

    def units(self, start: int) -> tuple[slice, ...]:
        return (*(slice(None),) * self.dim, slice(start, start + self.starts.step))

    def entries(self, start: int) -> tuple[slice, ...]:
        stop = (start + self.starts.step) * self.size
        return (*(slice(None),) * self.dim, slice(start * self.size, stop))


def _cut(scores: Tensor, block: Sequence[int], chunk: int) -> _Cut:
    """Cut into chunks of about so many entries."""
    grid, chunks = grid_shape(block, scores.shape), -(-scores.numel() // chunk)
    # along the first dim with enough units, which keeps rows whole
    dim = next((d for d, n in enumerate(grid) if n >= chunks), grid.index(max(grid)))
    return _Cut(dim, range(0, grid[dim], -(-grid[dim] // chunks)), block[dim])


def _reduced_on_cpu(scores: Tensor, block: Sequence[int], norm: Norm, exponent: int) -> Tensor:
    cut = _cut(scores, block, _CHUNK)
    out = np.empty(grid_shape(block, scores.shape), np.float64)
    source = (scores.float() if scores.dtype == torch.bfloat16 else scores).detach().numpy()

    def reduce(starts: Sequence[int]) -> None:
        with scratch(source[cut.entries(0)].size, np.float64) as memory:
            for start in starts:
                part = source[cut.entries(start)]
                terms = memory[: part.size].reshape(part.shape)
                np.copyto(terms, part)
                out[cut.units(start)] = _reduced(terms, block, norm, exponent)

    in_threads(reduce, cut.starts)
    return torch.from_numpy(out)


def exponent_of(scores: Tensor) -> int:
    """Return the power of two by which to scale where a square could leave the accumulator."""
    largest = torch.where(scores.isfinite(), scores, 0).abs().amax()
    return -int(torch.frexp(largest).exponent)


def _reduced(terms: Array, block: Sequence[int], norm: Norm, exponent: int) -> Array:
    """Reduce terms, which are overwritten."""
    if norm == "l1":
        terms = abs(terms)
    elif norm == "l2":
        if exponent:  # in two factors, each of which is a float
            terms *= 2.0 ** (exponent // 2)
            terms *= 2.0 ** (exponent - exponent // 2)
        terms *= terms
    for dim in reversed(range(terms.ndim)):
        if block[dim] > 1:
            terms = _sum_units(terms, dim, block[dim])
    return terms


def _sum_units(terms: Array, dim: int, size: int) -> Array:
    """Sum every ``size`` neighbours along ``dim``; a shorter tail is a sum of its own."""
    n = terms.shape[dim]
    whole = n - n % size
    parts = [
        _fold(terms[(slice(None),) * dim + (slice(start, stop),)], dim, length)
        for start, stop, length in ((0, whole, size), (whole, n, n - whole))
        if stop > start
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if isinstance(terms, Tensor) else np.concatenate(parts, dim)


def _fold(terms: Array, dim: int, size: int) -> Array:
    """Add halves until one term is left; the odd one is added to the first."""
    shape, behind = terms.shape, math.prod(terms.shape[dim + 1 :])
    terms = terms.reshape(*shape[:dim], shape[dim] // size, size, *shape[dim + 1 :])
    lead = (slice(None),) * (dim + 1)
    while size > 1 and size * behind > _SHORT:
        half = size // 2
        sums = terms[(*lead, slice(0, half))] + terms[(*lead, slice(half, 2 * half))]
        if size % 2:
            sums[(*lead, 0)] += terms[(*lead, size - 1)]
        terms, size = sums, half
    few = [terms[(*lead, i)] for i in range(size)]
    while len(few) > 1:  # the same sums, in loops over units instead of their terms
        half = len(few) // 2
        added = [few[i] + few[i + half] for i in range(half)]
        if len(few) % 2:
            added[0] += few[-1]
        few = added
    return few[0]


def spread(keep: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the unit grid's decisions at every entry; a view where units span whole dims."""
    if is_entry(block):
        return keep
    grid = grid_shape(block, shape)
    if all(b == 1 or g <= 1 for b, g in zip(block, grid, strict=True)):
        return keep.expand(tuple(shape))
    pairs = [n for pair in zip(grid, block, strict=True) for n in pair]
    single = [n for g in grid for n in (g, 1)]
    whole = [b * g for b, g in zip(block, grid, strict=True)]
    cut = tuple(slice(n) for n in shape)
    if keep.device.type == "cpu":
        tiles = _tiles(keep.numpy().reshape(single), pairs)
        return torch.from_numpy(np.ascontiguousarray(tiles.reshape(whole)[cut]))
    return keep.reshape(single).expand(pairs).reshape(whole)[cut].contiguous()


def _tiles(flags: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Repeat flags where the shape says so; along the last dim first, where copies are short."""
    tiles = np.empty(shape, dtype=np.bool_)  # for which numpy asks for huge pages
    rows, last = max(1, _CHUNK * shape[0] // max(tiles.size, 1)), shape[-1]

    def repeat(starts: Sequence[int]) -> None:
        for start in starts:
            part, into = flags[start : start + rows], tiles[start : start + rows]
            if not 1 < last <= _SHORT:
                into[...] = part
                continue
            with scratch(part.size * last, np.bool_) as memory:
                row = memory.reshape(*part.shape[:-1], last)
                for i in range(last):
                    row[..., i] = part[..., 0]
                into[...] = row

    in_threads(repeat, range(0, shape[0], rows))
    return tiles
