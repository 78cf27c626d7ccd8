"""What structure the zeros of a tensor have: channels, blocks, N:M. Found in values, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purprune import Count

_SIZES = (2, 4, 8, 16)
_SHARE = Fraction(9, 10)
"""Of the zeros, what a pattern must account for to be named: others lie in it by chance."""


class FoundNM(NamedTuple):
    """In every ``m`` neighbours along ``dim`` at least ``zeros`` are zero."""

    zeros: int
    m: int
    dim: int

    def __str__(self) -> str:
        """Return for instance ``2:4 along dim 1``."""
        return f"{self.zeros}:{self.m} along dim {self.dim}"


@dataclass(frozen=True)
class Structure:
    """The zeros of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: Count
    zero_channels: tuple[int, ...] = ()
    """How many slices are all zero, along each of the first two dims."""
    block: tuple[int, ...] = ()
    """The largest blocks of which each is all zero or has no zero; empty: none."""
    nm: FoundNM | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "entries": self.count.entries,
            "zeros": self.count.zeros,
            "sparsity": float(self.count),
            "zero_channels": list(self.zero_channels),
            "block": list(self.block) or None,
            "n_m": None if self.nm is None else self.nm._asdict(),
        }

    def __str__(self) -> str:
        """Return the structure in words."""
        found = [f"{n} zero channels along dim {d}" for d, n in enumerate(self.zero_channels) if n]
        if self.block:
            found.append(f"blocks of {'x'.join(map(str, self.block))}")
        if self.nm is not None:
            found.append(str(self.nm))
        return "; ".join(found)


@torch.no_grad()
def structure_of(name: str, tensor: Tensor) -> Structure:
    """Return what structure the zeros of a tensor have.

    Blocks are looked for where not all zeros are in zero channels, and 2 to 16 entries along dims
    0 and 1, and whole kernels. N:M is looked for in groups of 2, 4, 8 and 16 along every dim; the
    one that asks for most zeros is named, if it accounts for nine tenths of them.

    >>> rows = [[0.0, 0.0, 1.0, 2.0], [0.0, 3.0, 0.0, 4.0], [5.0, 0.0, 6.0, 0.0]]
    >>> found = structure_of("w", torch.tensor(rows))
    >>> str(found.count), str(found)
    ('6 of 12 (50.00 %)', '2:4 along dim 1')
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    zero = (tensor.float() if tensor.itemsize == 1 else tensor) == 0
    count = Count(int(torch.count_nonzero(zero)), zero.numel())
    plain = Structure(name, tuple(tensor.shape), dtype, count)
    if zero.dim() < 2 or count.zeros in (0, count.entries):
        return plain
    channels = tuple(_zero_slices(zero, dim) for dim in (0, 1))
    whole = any(n * count.entries == count.zeros * zero.shape[d] for d, n in enumerate(channels))
    block = () if whole else _block(zero)
    nm = None if whole or block else _nm(zero, count)
    return Structure(name, plain.shape, dtype, count, channels, block, nm)


def _zero_slices(zero: Tensor, dim: int) -> int:
    others = [d for d in range(zero.dim()) if d != dim]
    for d in sorted(others, reverse=True):
        zero = zero.all(dim=d)
    return int(torch.count_nonzero(zero))


def _block(zero: Tensor) -> tuple[int, ...]:
    """Return the largest block extents that hold, by how many entries they have."""
    held = [block for block in _candidates(zero) if _holds(zero, block)]
    sizes = [math.prod(map(min, block, zero.shape)) for block in held]
    return held[sizes.index(max(sizes))] if held else ()


def _candidates(zero: Tensor) -> Iterator[tuple[int, ...]]:
    """Yield block extents; larger ones only where blocks of two hold."""
    behind = (1,) * (zero.dim() - 2)
    if zero.dim() > 2:
        yield 1, 1, *zero.shape[2:]
    tall, wide = _holds(zero, (2, 1, *behind)), _holds(zero, (1, 2, *behind))
    for n in _SIZES:
        if tall:
            yield n, 1, *behind
        if wide:
            yield 1, n, *behind
        if tall and wide:
            yield n, n, *behind


def _holds(zero: Tensor, block: Sequence[int]) -> bool:
    """Tell whether each block is all zero or has no zero; ragged ones are of what is there."""
    if any(b > n for b, n in zip(block, zero.shape, strict=True)):
        return False
    every, some = zero, zero
    for dim, size in enumerate(block):
        if size > 1:
            every, some = _folded(every, dim, size, True), _folded(some, dim, size, False)
    return bool(torch.equal(every, some))


def _folded(zero: Tensor, dim: int, size: int, every: bool) -> Tensor:
    """Join ``size`` neighbours along a dim by and, or by or."""
    moved = zero.movedim(dim, -1)
    fill = torch.full((*moved.shape[:-1], -moved.shape[-1] % size), every)
    groups = torch.cat([moved, fill], dim=-1).reshape(*moved.shape[:-1], -1, size)
    folded: Tensor = groups.all(dim=-1) if every else groups.any(dim=-1)
    return folded.movedim(-1, dim)


def _nm(zero: Tensor, count: Count) -> FoundNM | None:
    """Return the N:M that asks for most zeros, of those the one with the smallest groups."""
    dims = [1, 0, *range(2, zero.dim())]
    found = [nm for dim in dims for nm in _along(zero, dim)]
    best = max(found, key=lambda nm: (Fraction(nm.zeros, nm.m), -nm.m), default=None)
    enough = best is not None and Fraction(best.zeros, best.m) >= _SHARE * count.fraction
    return best if enough else None


def _along(zero: Tensor, dim: int) -> Iterator[FoundNM]:
    """Yield for each size of a group how many zeros every group along a dim has."""
    size = zero.shape[dim]
    counts = zero.movedim(dim, -1).reshape(-1, size).to(torch.uint8)
    for m in _SIZES:
        if m > size:
            return
        if counts.shape[1] % 2:
            counts = torch.nn.functional.pad(counts, (0, 1))
        counts = counts[:, 0::2] + counts[:, 1::2]
        zeros = int(counts[:, : size // m].amin())
        tail_due = size % m * zeros // m
        tail = int(counts[:, size // m].amin()) if size % m else 0
        if zeros and tail >= tail_due:
            yield FoundNM(zeros, m, dim)
